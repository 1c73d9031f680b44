"""Files that appear whole or not at all.

Everything is written to `<name>.<process>.part` beside its goal and renamed when it is complete; whatever
ends the writing early, Ctrl-C included, takes the `.part` with it. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffharness.errors import OutputError

_RESERVE = 16 << 20  # bytes left free on the disk


def check_space(folder: Path, n_bytes: int) -> None:
    """OutputError where `folder` does not exist or its disk has no room for `n_bytes`, which are 0 for a few."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _translate(error, folder) from error
    if n_bytes and n_bytes + _RESERVE > free:
        raise OutputError(
            f"{folder}: {_mib(n_bytes + _RESERVE)} must be free to write {_mib(n_bytes)}, found {_mib(free)}",
            hint="free some space, or choose another place with --out or TMPDIR",
        )


def require_replaceable(path: Path) -> None:
    """OutputError where `path` is a folder, a device or a pipe: a file renamed over it would destroy it, or fail."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise OutputError(f"cannot write {path}: it is {what}", hint="give the name of a file")


@contextlib.contextmanager
def whole_file(path: Path, n_bytes: int = 0) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends without an error.

    `n_bytes` is what will be written, where that is much, checked against the free space first. OSErrors of
    the block come out as OutputError.
    """
    require_replaceable(path)
    check_space(path.parent, n_bytes)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        _remove(part)
        raise _translate(error, path) from error
    except BaseException:
        _remove(part)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _translate(error: OSError, path: Path) -> OutputError:
    hints = {
        errno.ENOSPC: "the disk is full: free some space, or choose another place",
        errno.EDQUOT: "the quota is used up: free some space, or choose another place",
        errno.EACCES: "no permission to write there: choose another place",
        errno.EROFS: "the file system is read-only: choose another place",
        errno.ENOENT: "the folder does not exist: create it first",
    }
    hint = hints.get(error.errno or 0, "choose another place")
    return OutputError(f"cannot write {path}: {error.strerror or error}", hint=hint)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.0f} MiB"
