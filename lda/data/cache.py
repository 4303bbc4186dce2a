"""Where files that can be made again are kept: stand-in data sets, packed images."""

from __future__ import annotations

import os
from pathlib import Path

from lda.arguments import checked, output_folder, path

_OWN, _SHARED = "LDA_CACHE_DIR", "XDG_CACHE_HOME"


def cache_dir() -> Path:
    """`$LDA_CACHE_DIR`, else `$XDG_CACHE_HOME/lda-reid`, else `~/.cache/lda-reid`. The folder need not exist yet.

    Raises UsageError where `~` has no meaning.
    """
    for variable, below in ((_OWN, ""), (_SHARED, "lda-reid")):
        if folder := os.environ.get(variable):
            return checked(variable, path, folder) / below
    return checked(_OWN, path, "~/.cache/lda-reid")


def check_cache() -> None:
    """Raises UsageError where the cache folder cannot be made or written; makes nothing."""
    checked(f"cache folder (set {_OWN} to another)", output_folder, cache_dir())
