"""Where files that can be made again are kept: stand-in data sets, packed images."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LDA_CACHE_DIR`, else `$XDG_CACHE_HOME/lda-reid`, else `~/.cache/lda-reid`. The folder need not exist yet."""
    if own := os.environ.get("LDA_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lda-reid"
    return Path.home() / ".cache" / "lda-reid"
