"""The folder that a run's captures go to: one run at a time, and a run that fails leaves none behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffharness.errors import OutputError

_CAPTURES = ("engine-*.safetensors", "reference-*.safetensors")
_REPORTS = ("run.json", "report.md", "report.html", "grade.json", "grade.md", "matrix.json", "matrix.md")


@contextlib.contextmanager
def run_folder(out: Path | None) -> Iterator[Path]:
    """`out` without an earlier run's files, or a temporary folder that goes when the run ends.

    OutputError where another run writes to `out`. Captures of a run that does not come to its end are
    removed: without a record nothing says what they are of.
    """
    if out is None:
        folder = Path(tempfile.mkdtemp(prefix="diffharness-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    with _locked(out):
        _remove(out, _CAPTURES + _REPORTS)
        try:
            yield out
        except BaseException:
            _remove(out, _CAPTURES)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` for the time of the block; the system lifts the lock of a run that dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another run is writing to {folder}",
                hint="give each run its own --out, or wait until that one has ended",
            ) from error
        except OSError:  # a file system without locks: then nobody can be kept out
            pass
        yield
    finally:
        os.close(descriptor)


def _remove(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()
