"""The table of a bench, a line at a time, since it takes long to fill: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from bench.timing import Row
from diffharness.machine import Machine

PACKAGES = ("llama-cpp-python", "torch", "transformers", "numpy", "gguf")
_WIDTH = 76  # of what was measured


class Text:
    """Columns of fixed width, what a part is called above its rows."""

    def start(self) -> list[str]:
        return [_line("ratio", "limit", "", "what", "measured")]

    def part(self, name: str) -> list[str]:
        return ["", name]

    def row(self, row: Row) -> list[str]:
        state = {None: "", True: "ok", False: "OVER"}[None if row.limit is None else row.ok]
        return [_line(_number(row.ratio), _limit(row), state, row.what, row.detail)]


class Markdown:
    """A table of GitHub's Markdown; a ratio over its limit is bold."""

    def start(self) -> list[str]:
        return ["| what | ratio | limit | measured |", "|---|---:|---:|---|"]

    def part(self, name: str) -> list[str]:
        return [f"| **{name}** | | | |"]

    def row(self, row: Row) -> list[str]:
        ratio = _number(row.ratio)
        cells = (row.what, ratio if row.ok else f"**{ratio}**", _limit(row), row.detail)
        return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]


def machine_line(machine: Machine, versions: Mapping[str, str]) -> str:
    """The machine and the versions that numbers depend on, as a sentence."""
    flags = ", ".join(flag for flag in machine.flags if flag.startswith(("avx", "amx", "asimd", "i8mm", "sve", "sme")))
    cores = f"{machine.cores} core" + ("s" if machine.cores != 1 else "")
    packages = ", ".join(f"{name} {found}" for name, found in versions.items())
    parts = (machine.cpu, flags and f"with {flags}", f"{cores}, {machine.memory_bytes / 2**30:.0f} GiB")
    return f"{', '.join(filter(None, parts))}; {machine.system}; Python {machine.python}, {packages}"


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, those that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _line(ratio: str, limit: str, state: str, what: str, measured: str) -> str:
    return f"{ratio:>7} {limit:>6}  {state:4}  {what:{_WIDTH}}  {measured}".rstrip()


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}"


def _limit(row: Row) -> str:
    return "" if row.limit is None else f"{row.limit:.2f}"
