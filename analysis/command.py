"""How the commands of this folder end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lda.errors import UsageError


def exit_code(work: Callable[[], None]) -> int:
    """Do `work`. 0 done, 1 failed (a disk that is full or not writable), 2 bad usage, 130 interrupted."""
    try:
        work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
