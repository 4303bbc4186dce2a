"""MATLAB 5 files, in which several data sets keep their lists (7.3 is HDF5: lda/data/sets/cuhk03.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lda.errors import UsageError


def load_mat(path: Path) -> dict[str, Any]:
    """A MATLAB 5 file. Raises UsageError if it is something else, such as a saved web page or a Git LFS pointer."""
    with path.open("rb") as file:
        head = file.read(32)
    if head.startswith(b"MATLAB 7.3"):
        raise UsageError(f"{path}: a MATLAB 7.3 file where MATLAB 5.0 is expected; download the original again")
    if not head.startswith(b"MATLAB 5.0"):
        raise UsageError(f"{path}: not a MAT file, its first bytes are {head[:24]!r}; download it again")
    from scipy.io import loadmat  # here because it takes a while to import and few data sets need it

    try:
        content: dict[str, Any] = loadmat(path)
    except Exception as error:  # scipy raises many types for a damaged file
        raise UsageError(f"{path}: damaged MAT file ({error}); download it again") from error
    return content
