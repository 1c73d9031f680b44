"""`python -m bench.confusion`: judge every case and print the matrix; ends with 1 if a judge is wrong anywhere.

--only TEXT   cases whose name holds TEXT      --quick   the few that the tests judge
--no-run      `inspect` alone, no forwards     --truth clean|weights|metadata|file|lineage
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.confusion.cases import CASES, Case
from bench.confusion.files import Files
from bench.confusion.judging import Judge, Judged
from bench.confusion.matrix import line, report
from diffharness.engine.quantizer import Quantizer
from diffharness.settings import load_engine, load_tolerances


def judge_all(cases: Sequence[Case], *, with_run: bool) -> list[Judged]:
    """Every case judged, one line each on standard error as it goes."""
    settings = load_engine("native").changed(threads=1)
    judged = []
    with tempfile.TemporaryDirectory() as folder, Quantizer(settings) as quantizer:
        judge = Judge(Files(Path(folder), quantizer, settings), settings, load_tolerances())
        for case in cases:
            judged.append(judge.judge(case, with_run=with_run))
            print(line(judged[-1]), file=sys.stderr, flush=True)
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--truth", default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-run", action="store_true")
    args = parser.parse_args()
    cases = [
        case
        for case in CASES
        if args.only in case.name and args.truth in (None, case.truth) and (case.quick or not args.quick)
    ]
    if not cases:
        raise SystemExit("no case has that name")
    judged = judge_all(cases, with_run=not args.no_run)
    print(report(judged))
    raise SystemExit(any(j.faults for j in judged))


if __name__ == "__main__":
    main()
