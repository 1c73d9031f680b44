"""What a command takes: seconds, and the peaks of resident memory of its process and of those that it starts.

Linux only. The system keeps each process's high-water mark of resident memory (VmHWM), in which the pages of mapped
files count that it could drop at any time. How much is resident without them (RssAnon) is looked at every few
hundredths of a second: shorter peaks of that are missed, and so is all that a process takes in its last moments.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 0.03
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Footprint:
    """One run of a command. Peaks are in bytes: `own` and, without mapped files, `held` of the command's process.

    `workers` is that of the largest process below it.
    """

    seconds: float
    code: int
    own: int
    held: int
    workers: int

    @property
    def peaks(self) -> str:
        """In words."""
        own, held, workers = (f"{size / 1e6:.0f} MB" for size in (self.own, self.held, self.workers))
        return f"peak {own} ({held} without mapped files), of its workers {workers}"


def footprint(command: Sequence[str], good: Sequence[int] = (0,)) -> Footprint:
    """Run the command from the repository's root and watch it. SystemExit if it ends with another code than `good`."""
    own = held = workers = 0
    with tempfile.TemporaryFile("w+") as words:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words, cwd=_ROOT)
        try:
            while process.poll() is None:
                own, held = max(own, _field(process.pid, "VmHWM")), max(held, _field(process.pid, "RssAnon"))
                workers = max((workers, *(_field(pid, "VmHWM") for pid in _below(process.pid))))
                time.sleep(_EVERY_S)
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - begin
        if process.returncode not in good:
            words.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {words.read()[-2000:]}")
    return Footprint(seconds, process.returncode, own, held, workers)


def _below(pid: int) -> Iterator[int]:
    """The processes that this one has started, and theirs.

    One that has not yet become another program still shows its parent's memory, and is left out.
    """
    line = _read(pid, "cmdline")
    for thread in _threads(pid):
        for child in map(int, _read(pid, f"task/{thread}/children").split()):
            if _read(child, "cmdline") not in ("", line):
                yield child
                yield from _below(child)


def _threads(pid: int) -> list[str]:
    try:
        return [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def _field(pid: int, name: str) -> int:
    """A memory field of /proc/PID/status, in bytes; 0 of a process that has ended."""
    for line in _read(pid, "status").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _read(pid: int, name: str) -> str:
    """A file of the process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
