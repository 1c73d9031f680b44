"""Facts about the machine that a run depends on: processor, memory, Python. Standard library only."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

# What changes which kernels an engine picks; a processor's flags that are none of these are left out.
FLAGS_OF_INTEREST = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """One machine. `memory_bytes` is what this process may use: a container's limit where there is one."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str
    python: str

    @property
    def has_amx(self) -> bool:
        return any(flag.startswith("amx") for flag in self.flags)

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"flags": list(self.flags)}


def this_machine() -> Machine:
    """What this machine is; whatever the system does not tell is left empty or 0."""
    cpu, flags = _cpu()
    return Machine(
        cpu=cpu,
        flags=flags,
        cores=usable_cores(),
        memory_bytes=_memory(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take, files' pages that the system would give back counted in.

    Of the machine, or of the control group where that leaves less; None where the system does not tell. `root` is
    where the system's files are.
    """
    found = [kib * 1024 for kib in [_entry(root / "proc/meminfo", "MemAvailable:")] if kib is not None]
    for folder, limit, used, file_pages in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = root / folder
        if (group / limit).exists() and (most := (group / limit).read_text().strip()).isdigit():
            taken = int((group / used).read_text()) if (group / used).exists() else 0
            back = _entry(group / "memory.stat", file_pages) or 0
            found.append(max(0, int(most) - taken + min(back, taken)))
    return min(found, default=None)


def _entry(file: Path, name: str) -> int | None:
    """The number behind `name` in a file of lines of names and numbers."""
    fields = (line.split() for line in file.read_text().splitlines()) if file.exists() else ()
    return next((int(each[1]) for each in fields if len(each) > 1 and each[0] == name), None)


def free_disk(path: Path) -> int:
    """Bytes free where `path` is or would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _cpu() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and those of its flags that matter."""
    fields = _proc_cpuinfo()
    name = fields.get("model name") or fields.get("Hardware") or _sysctl("machdep.cpu.brand_string")
    known = set((fields.get("flags") or fields.get("Features") or "").split())
    return name or platform.processor() or platform.machine(), tuple(f for f in FLAGS_OF_INTEREST if f in known)


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor's entry in Linux's /proc/cpuinfo; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    first = file.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _sysctl(name: str) -> str:
    """One of macOS's and BSD's system values; empty where there is no sysctl or no such value."""
    program = shutil.which("sysctl")
    if program is None:
        return ""
    done = subprocess.run([program, "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _memory() -> int:
    """Bytes of memory, or the control group's limit where that is lower."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        limit = file.read_text().strip() if file.exists() else "max"
        if limit.isdigit():
            total = min(total, int(limit))
    return total
