"""What every report says, in rows of plain text: the renderers only lay it out.

Strings that come from a file (names, paths, messages) pass through `clean` here, and are escaped by
each renderer for its own format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffharness.records import LEG_NAMES, Divergence, Finding, Leg, RunRecord, Score, TapRow
from diffharness.report._format import NONE, clean, cosine, decimals, percent, scientific, size

WORST_TAPS = 10


class Table(NamedTuple):
    """A title, column heads and rows of cells; columns from the second on are numbers where `numeric`."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: bool = False


def subject(record: RunRecord) -> list[tuple[str, str]]:
    """What was under test: label and text."""
    about = record.subject
    rows = [("artifact", _artifact(record))]
    if about.checkpoint is not None:
        source = about.checkpoint
        rows.append(("checkpoint", _joined([source.path, source.model_type or source.arch, _types(source.types)])))
    if about.fixture is not None:
        fixture = about.fixture
        tokens = f"{fixture.n_tokens} tokens, {fixture.n_scored} scored"
        chunk = f"chunks of {fixture.chunk}" if fixture.chunk else None
        sha = f"ids sha256 {fixture.sha256[:16]}" if fixture.sha256 else None
        rows.append(("fixture", _joined([fixture.name, tokens, chunk, sha])))
    if about.engine is not None:
        engine = about.engine
        build = _joined([f"llama.cpp {engine.version or 'of unknown version'}", engine.commit])
        rows.append(("engine", build))
        shown = {k: v for k, v in engine.settings.items() if v is not None and k != "name"}
        if shown:
            rows.append(("settings", clean(_pairs(shown))))
        if engine.overrides:
            rows.append(("overrides", clean(", ".join(engine.overrides))))
    if about.machine:
        rows.append(("machine", clean(_pairs(about.machine), 200)))
    return rows


def legs(record: RunRecord) -> Table:
    """One row per leg: status, numbers of its logits, and why."""
    head = ("leg", "status", "logits NMSE", "mean KL", "p99 KL", "top-1", "note")
    rows = []
    for name in LEG_NAMES:
        leg = record.legs.get(name)
        logits = leg.logits
        numbers = (
            (scientific(logits.nmse), scientific(logits.kl_mean), scientific(logits.kl_p99), percent(logits.top1))
            if logits is not None
            else (NONE,) * 4
        )
        rows.append((name, leg.status.replace("_", " "), *numbers, clean(leg.reason or "", 160)))
    return Table("Legs", head, rows)


def scores(record: RunRecord) -> list[tuple[str, str]]:
    """Perplexities: who scored what, and the number."""
    named: list[tuple[str, Score]] = []
    named += [(f"reference on {what}", score) for what, score in record.scores.reference.items()]
    named += [(f"engine, {what}", score) for what, score in record.scores.engine.items()]
    return [(clean(name, 40), decimals(score.ppl)) for name, score in named]


def divergence(record: RunRecord) -> str | None:
    """The first divergence as a sentence."""
    found = record.first_divergence
    if found is None:
        return None
    text = f"first divergence in the {found.leg} leg at {found.tap}"
    if found.token is not None:
        text += f", token {found.token}"
        if found.position is not None and found.position != found.token:
            text += f" (position {found.position} of its chunk)"
    return clean(f"{text}: NMSE {scientific(found.nmse)} end to end{_local(found)}")


def affected(record: RunRecord) -> str | None:
    """Which layers and positions, or which classes of tensors, are affected."""
    told = [record.legs.graph.affected, record.legs.artifact.pattern]
    shown = [clean(text, 300) for text in told if text]
    return "; ".join(shown) or None


def worst_taps(record: RunRecord, most: int = WORST_TAPS) -> Table | None:
    """The taps with the largest local error: of the graph leg, or of the artifact leg where only that has any."""
    graph = bool(record.legs.graph.taps)
    leg: Leg = record.legs.graph if graph else record.legs.artifact
    ranked = sorted(leg.taps, key=_badness, reverse=True)[:most]
    if not ranked:
        return None
    what = (
        "own end to end, local on the engine's layer inputs" if graph else "artifact and control, from the checkpoint"
    )
    return taps(ranked, f"NMSE of the {len(ranked)} worst of {len(leg.taps)} taps: {what}", graph=graph)


def taps(rows: Sequence[TapRow], title: str, *, graph: bool) -> Table:
    """Taps with NMSE end to end and local (or the control's) side by side; the token is the worst one."""
    head = ("tap", "own", "local" if graph else "control", "floor", "cos", "max abs", "token", "")
    cells = [
        (
            clean(row.tap, 60),
            scientific(row.nmse),
            scientific(row.nmse_local if graph else row.nmse_control),
            scientific(row.floor),
            cosine(row.cos),
            scientific(row.max_abs),
            NONE if row.worst_token is None else str(row.worst_token),
            "not judged" if row.ok is None else "ok" if row.ok else "fails",
        )
        for row in rows
    ]
    return Table(title, head, cells, numeric=True)


def findings(record: RunRecord, most: int | None = None) -> list[str]:
    """Guilty findings first, without the one that the verdict's summary tells; the last line counts those left out."""
    told = next((finding for finding in record.findings if finding.kind == record.verdict.primary), None)
    ordered = sorted((f for f in record.findings if f is not told), key=lambda finding: finding.kind is None)
    shown = ordered if most is None or len(ordered) <= most else ordered[: most - 1]
    lines = [_finding(finding) for finding in shown]
    if len(shown) < len(ordered):
        lines.append(f"and {len(ordered) - len(shown)} more, in the record")
    return lines


def _finding(finding: Finding) -> str:
    return clean(f"{finding.kind or finding.leg or 'note'}: {finding.message}", 300)


def _artifact(record: RunRecord) -> str:
    about = record.subject.artifact
    params = f"{about.n_params / 1e6:.1f}M parameters" if about.n_params else None
    n_bytes = size(about.n_bytes) if about.n_bytes is not None else None
    sha = f"sha256 {about.sha256[:16]}" if about.sha256 else None
    return _joined([about.path, about.arch, params, n_bytes, _types(about.types), sha])


def _types(types: Mapping[str, int]) -> str | None:
    ordered = sorted(types.items(), key=lambda item: -item[1])
    return " ".join(f"{name}:{count}" for name, count in ordered[:8]) or None


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, dict | list))


def _joined(parts: Sequence[str | None]) -> str:
    return " · ".join(clean(part, 120) for part in parts if part)


def _local(found: Divergence) -> str:
    return "" if found.nmse_local is None else f", {scientific(found.nmse_local)} local"


def _badness(row: TapRow) -> tuple[bool, float]:
    value = row.nmse if row.nmse_local is None else row.nmse_local
    if value is None or value != value:
        value = float("inf")
    if row.nmse_control:
        value /= row.nmse_control
    return row.ok is False, value
