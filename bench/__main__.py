"""`python -m bench`: prints every ratio with its limit; exits with 1 if one is over it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from bench import dequant, engine, kernel, reference
from diffharness.machine import this_machine


def main() -> int:
    machine = this_machine()
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"SmolLM2-135M-Instruct Q4_1, 512 tokens unless it says otherwise, {machine.cores} cores, {machine.cpu}"
    )
    rows = [*dequant.speed(), *reference.speed(), *reference.memory(), *kernel.kernel_leg(), *engine.engine_and_run()]
    table = Table("ratio", "limit", "", "what", "measured", box=None, pad_edge=False)
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:.2f}"
        table.add_row(f"{row.ratio:.2f}", limit, "ok" if row.ok else "OVER", row.what, row.detail)
    console.print(table)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
