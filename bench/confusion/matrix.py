"""The confusion matrix and what stands out of it, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from bench.confusion.judging import Judged, Said

_ORDER = ("agree", "artifact.weights", "artifact.metadata", "artifact.file", "artifact.lineage", "inconclusive")


def table(judged: Sequence[Judged], judge: str) -> str:
    """Truth by first verdict of one judge."""
    counts: Counter[tuple[str, str]] = Counter()
    for j in judged:
        said: Said | None = getattr(j, judge)
        if said is not None:
            counts[j.case.truth, said.kinds[0]] += 1
    truths = list(dict.fromkeys(j.case.truth for j in judged))
    verdicts = [v for v in _ORDER if any(key[1] == v for key in counts)]
    verdicts += sorted({key[1] for key in counts} - set(_ORDER))
    heads = [v.removeprefix("artifact.") for v in verdicts]
    width = max([9, *map(len, heads)]) + 2
    lines = [f"{judge:<10}" + "".join(f"{head:>{width}}" for head in heads)]
    for truth in truths:
        cells = "".join(f"{counts[truth, v] or '.':>{width}}" for v in verdicts)
        lines.append(f"{truth:<10}{cells}")
    return "\n".join(lines)


def report(judged: Sequence[Judged]) -> str:
    """Both matrices, the cases below detection, and every wrong word."""
    archs = {j.case.base.model.split("-")[0] if not j.case.base.model.startswith("tiny") else "gemma4" for j in judged}
    parts = [f"{len(judged)} cases, {len(archs)} architectures ({', '.join(sorted(archs))}); rows are what is true"]
    parts += [table(judged, judge) for judge in ("inspect", "run") if any(getattr(j, judge) for j in judged)]
    clean = [j.inspect.ratio for j in judged if j.case.truth == "clean"]
    if clean:
        parts.append(f"clean tensors reach {max(clean):.2f} times the control's error")
    parts.append(_listed("below the band, and named by nobody", (_below(j) for j in judged if j.excused)))
    parts.append(_listed("wrong", (f"{_head(j)}\n      " + "\n      ".join(j.faults) for j in judged if j.faults)))
    return "\n\n".join(part for part in parts if part)


def line(j: Judged) -> str:
    """One case in one line, for progress."""
    said = ", ".join(j.inspect.kinds) + ("" if j.run is None else f" | {', '.join(j.run.kinds)}")
    mark = "WRONG" if j.faults else "below" if j.excused else "ok"
    seconds = j.inspect.seconds + (j.run.seconds if j.run else 0.0)
    return f"{mark:<6}{_head(j)} -> {said} [{', '.join(sorted(j.inspect.patterns))}] {seconds:.1f} s"


def _head(j: Judged) -> str:
    move = "" if j.move is None else f", perplexity {j.move:+.2%}"
    return f"{j.case.truth}: {j.case.name} (error {j.inspect.ratio:.2f}x{move})"


def _below(j: Judged) -> str:
    return f"{j.case.name}: {j.excused}"


def _listed(title: str, lines: Iterable[str]) -> str:
    rows = list(lines)
    return f"{title}: {len(rows)}" + "".join(f"\n  - {row}" for row in rows)
