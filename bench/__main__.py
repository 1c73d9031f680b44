"""`python -m bench [PART...] [--markdown]`: every ratio with its limit; exits with 1 if one is over it.

The parts are those of PARTS, in its order; what each takes is told on standard error. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module

from bench.table import Markdown, Text, machine_line, versions
from bench.timing import Row
from diffharness.allocator import keep_freed_memory
from diffharness.machine import this_machine

# What each part shows, and the functions of this package that make its rows.
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "dequant": ("Dequantization", ("dequant:speed",)),
    "reference": ("The reference on SmolLM2, 512 tokens", ("reference:speed", "reference:memory")),
    "lengths": ("The reference's forward against transformers and llama.cpp", ("lengths:against_others",)),
    "forward": ("The reference's forward of every architecture, 512 tokens", ("forward:against_transformers",)),
    "kernel": ("The kernel leg", ("kernel:kernel_leg",)),
    "engine": ("The engine's capture on SmolLM2, 512 tokens", ("engine:capture",)),
    "commands": ("Whole commands, 512 tokens unless it says otherwise", ("commands:whole",)),
    "growth": ("Growth: the exponent in place of a ratio", ("growth:growth",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed and memory, as ratios.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--markdown", action="store_true", help="a table for README.md")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, found {', '.join(unknown)}")
    keep_freed_memory()  # as the command line does, before any library starts its threads
    table = Markdown() if given.markdown else Text()
    _say([machine_line(this_machine(), versions()), "", *table.start()])
    all_ok = True
    for part in [name for name in PARTS if not given.parts or name in given.parts]:
        title, _ = PARTS[part]
        _say(table.part(title))
        begin = time.perf_counter()
        for row in rows(part):
            _say(table.row(row))
            all_ok &= row.ok
        print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return 0 if all_ok else 1


def rows(part: str) -> Iterator[Row]:
    """Its modules are imported here, torch and transformers with them."""
    for name in PARTS[part][1]:
        module, _, function = name.partition(":")
        made: Callable[[], Iterable[Row]] = getattr(import_module(f"bench.{module}"), function)
        yield from made()


def _say(lines: list[str]) -> None:
    """At once: a bench is watched."""
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
