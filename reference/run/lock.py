"""One trainer a run folder: a second one is refused while the first is alive."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import IO, Any

from reference.errors import ConfigError


def lock(file: IO[Any], run: Path) -> None:
    """Lock an open file of a run folder, until it is closed or the process ends, however that ends.

    Raises:
        ConfigError: another trainer holds the lock.
    """
    if sys.platform == "win32":  # no such locks
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"run: another trainer is writing to {run}. Wait for it, stop it, or choose another --run."
        raise ConfigError(message) from error
    except OSError:  # a file system without locks
        return


def check_unlocked(run: Path) -> None:
    """Go on, unless another trainer is writing to a run folder.

    Raises:
        ConfigError: one is.
    """
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        lock(file, run)
