"""What every report says, in rows of plain text: the renderers only lay it out.

Strings that come from a file (names, paths, messages) pass through `clean` here, and are escaped by
each renderer for its own format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffharness.records import (
    LEG_NAMES,
    ArtifactSubject,
    CheckpointSubject,
    Divergence,
    EngineSubject,
    Finding,
    FixtureSubject,
    GraphLeg,
    KernelLeg,
    LayerRow,
    Leg,
    LegName,
    LogitStats,
    RunRecord,
    Score,
    SettingsLeg,
    Subject,
    TapRow,
)
from diffharness.report._format import NONE, clean, cosine, decimals, percent, scientific, size
from diffharness.settings import EngineSettings
from diffharness.words import counted

WORST_TAPS = 10
COMMAND = 4000  # characters of a command line: whole, unless somebody means harm
_SEE = "see the verdict"
_SAME = 0.9999  # a cosine from here on says nothing that the NMSE does not say better

_COMPARES: dict[LegName, str] = {
    "tokens": "tokenizer.json vs GGUF",
    "graph": "strict vs reference",
    "kernel": "native vs strict",
    "settings": "changed vs native",
    "artifact": "artifact vs checkpoint",
}


class Table(NamedTuple):
    """A title, column heads and rows of cells; columns from the second on are numbers where `numeric`."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: bool = False


def artifact(about: ArtifactSubject) -> str:
    """Path, architecture, size, types, and hash where there is one."""
    params = f"{about.n_params / 1e6:.1f}M parameters" if about.n_params else None
    n_bytes = size(about.n_bytes) if about.n_bytes is not None else None
    sha = f"sha256 {about.sha256[:16]}" if about.sha256 else None
    return _joined([about.path, about.arch, params, n_bytes, _types(about.types), sha])


def checkpoint(about: CheckpointSubject) -> str:
    """Path, kind of model, types."""
    return _joined([about.path, about.model_type or about.arch, _types(about.types)])


def tokens(about: FixtureSubject) -> str:
    """`english: 512 tokens, 255 scored`."""
    return f"{about.name}: {about.n_tokens} tokens, {about.n_scored} scored"


def subject(record: RunRecord) -> list[tuple[str, str]]:
    """What was under test: label and text."""
    return about(record.subject)


def about(about: Subject) -> list[tuple[str, str]]:
    """A record's subject: label and text."""
    rows = [("artifact", artifact(about.artifact))]
    if about.checkpoint is not None:
        rows.append(("checkpoint", checkpoint(about.checkpoint)))
    if about.fixture is not None:
        fixture = about.fixture
        n_tokens = f"{fixture.n_tokens} tokens, {fixture.n_scored} scored"
        chunk = f"chunks of {fixture.chunk}" if fixture.chunk else None
        sha = f"ids sha256 {fixture.sha256[:16]}" if fixture.sha256 else None
        rows.append(("fixture", _joined([fixture.name, n_tokens, chunk, sha])))
    if about.engine is not None:
        engine = about.engine
        build = _joined([f"llama.cpp {engine.version or 'of unknown version'}", engine.commit, engine.bindings])
        rows.append(("engine", build))
        if engine.settings:
            rows.append(("settings", _settings(engine)))
        if engine.overrides:
            rows.append(("overrides", clean(", ".join(engine.overrides))))
    if about.machine:
        rows.append(("machine", _machine(about.machine)))
    return rows


def legs(record: RunRecord) -> Table:
    """One row per leg: what it compares, status, numbers of its logits, and why; the artifact's control below it."""
    head = ("leg", "compares", "status", "logits NMSE", "mean KL", "p99 KL", "top-1", "note")
    rows: list[tuple[str, ...]] = []
    for name in LEG_NAMES:
        leg = record.legs.get(name)
        rows.append((name, _COMPARES[name], _status(leg), *_numbers(leg.logits), _note(record, leg)))
    control = record.legs.artifact.control
    if control is not None:
        note = "the checkpoint freshly quantized to the artifact's types: what these types lose"
        rows.append(("control", "control vs checkpoint", NONE, *_numbers(control), note))
    return Table("Legs", head, rows)


def _status(leg: Leg) -> str:
    if leg.status == "not_run" and leg.logits is not None:
        return "not judged"
    return leg.status.replace("_", " ")


def _numbers(logits: LogitStats | None) -> tuple[str, str, str, str]:
    if logits is None:
        return NONE, NONE, NONE, NONE
    return scientific(logits.nmse), scientific(logits.kl_mean), scientific(logits.kl_p99), percent(logits.top1)


def _note(record: RunRecord, leg: Leg) -> str:
    """Why; nothing where the verdict's summary has said it already."""
    reason = once(record, leg.reason)
    if reason == _SEE:
        return reason
    return clean("; ".join(part for part in (_extent(leg), reason) if part), 240)


def once(record: RunRecord, reason: str | None) -> str:
    """The reason, or where it stands where the verdict's summary has told it."""
    told = (reason or "").strip()
    return _SEE if told and told in record.verdict.summary else told


def _extent(leg: Leg) -> str:
    """How much was compared, of legs whose numbers do not say it."""
    if isinstance(leg, KernelLeg) and leg.nodes_replayed:
        tokens = f"{leg.n_batch} tokens together and {leg.n_single} alone"
        return f"{leg.nodes_replayed} of {leg.nodes_total} nodes replayed, {tokens}; its logits inform only"
    if isinstance(leg, GraphLeg) and leg.strict is not None and leg.strict.slices is not None:
        return f"strict engine in {leg.strict.slices} slices of at most {leg.strict.layers} layers"
    if isinstance(leg, SettingsLeg) and len(leg.pairs) > 1:
        return f"the worst of {len(leg.pairs)} pairs"
    return ""


def scores(record: RunRecord) -> list[tuple[str, str]]:
    """Perplexities: who scored what, and the number; the checkpoint first, as what the others are measured by."""
    named: list[tuple[str, Score]] = []
    ordered = sorted(record.scores.reference.items(), key=lambda item: item[0] != "checkpoint")
    named += [(f"reference on {what}", score) for what, score in ordered]
    named += [(f"engine: {what}", score) for what, score in record.scores.engine.items()]
    return [(clean(name, 60), decimals(score.ppl)) for name, score in named]


def divergence(record: RunRecord) -> str | None:
    """The first divergence as a sentence."""
    found = record.first_divergence
    if found is None:
        return None
    text = f"First divergence in the {found.leg} leg at {found.tap}"
    if found.token is not None:
        text += f", token {found.token}"
        if found.position is not None and found.position != found.token:
            text += f" (position {found.position} of its chunk, counted from 0)"
    return clean(f"{text}: NMSE {scientific(found.nmse)} end to end{_local(found)}")


def affected(record: RunRecord) -> str | None:
    """Which layers and positions, or which classes of tensors, are affected."""
    told = [record.legs.graph.affected, record.legs.artifact.pattern]
    shown = [clean(text, 300) for text in told if text]
    return "; ".join(shown) or None


def spread(record: RunRecord) -> list[tuple[str, str]]:
    """Where in the model and in the text a failing graph leg fails: by kind of layer and by position."""
    graph = record.legs.graph
    if graph.status != "fail":
        return []
    kinds: dict[str, list[LayerRow]] = {}
    for row in graph.per_layer:
        kinds.setdefault(row.kind, []).append(row)
    layers = [_kind(kind, rows) for kind, rows in kinds.items()]
    positions = [
        f"{_span(row.start, row.stop)} {'ok' if row.ok else 'fails'}, worst token {scientific(row.nmse_local)}"
        for row in graph.per_position
    ]
    lines = [("Layers", layers), ("Positions", positions)]
    return [(label, clean("; ".join(parts), 600)) for label, parts in lines if parts]


def _kind(kind: str, rows: Sequence[LayerRow]) -> str:
    worst = max(rows, key=lambda row: float("inf") if row.nmse_local != row.nmse_local else row.nmse_local)
    n_failing = sum(not row.ok for row in rows)
    at = f" at {worst.tap}" if worst.tap else ""
    return f"{kind}: {n_failing} of {len(rows)} fail, worst local NMSE {scientific(worst.nmse_local)}{at}"


def _span(start: int, stop: int) -> str:
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def worst_taps(record: RunRecord, most: int = WORST_TAPS) -> Table | None:
    """The taps with the largest local error: of the graph leg, or of the artifact leg where only that fails or ran."""
    legs = record.legs
    only_artifact = legs.artifact.status == "fail" and legs.graph.status != "fail" and bool(legs.artifact.taps)
    graph = bool(legs.graph.taps) and not only_artifact
    leg: Leg = legs.graph if graph else legs.artifact
    ranked = sorted(leg.taps, key=_badness, reverse=True)[:most]
    if not ranked:
        return None
    what = (
        "NMSE end to end, and local (layers fed the engine's input)"
        if graph
        else "NMSE of artifact and control, from the checkpoint"
    )
    return taps(ranked, f"The {len(ranked)} worst of {len(leg.taps)} taps: {what}", graph=graph)


def taps(rows: Sequence[TapRow], title: str, *, graph: bool) -> Table:
    """Taps with both their NMSE side by side; cosines where one of them tells anything; the token is the worst one."""
    with_cos = any(row.cos is not None and not row.cos >= _SAME for row in rows)
    names = ("end to end", "local") if graph else ("artifact", "control")
    head = ("tap", *names, "floor", *(("cos",) if with_cos else ()), "max abs", "worst token", "")
    cells = [
        (
            clean(row.tap, 60),
            scientific(row.nmse),
            scientific(row.nmse_local if graph else row.nmse_control),
            scientific(row.floor),
            *((cosine(row.cos),) if with_cos else ()),
            scientific(row.max_abs),
            NONE if row.worst_token is None else str(row.worst_token),
            "not judged" if row.ok is None else "ok" if row.ok else "fails",
        )
        for row in rows
    ]
    return Table(title, head, cells, numeric=True)


def findings(record: RunRecord, most: int | None = None) -> list[str]:
    """Guilty findings first, without the one that the verdict's summary tells; the last line counts those left out.

    An accusation that is none of the verdict's is not repeated: NaN in the file explains it.
    """
    told = next((finding for finding in record.findings if finding.kind == record.verdict.primary), None)
    holding = {None, "inconclusive", *record.verdict.all}
    held = [finding for finding in record.findings if finding is not told and finding.kind in holding]
    ordered = sorted(held, key=lambda finding: finding.kind is None)
    shown = ordered if most is None or len(ordered) <= most else ordered[: most - 1]
    lines = [_finding(finding) for finding in shown]
    if len(shown) < len(ordered):
        lines.append(f"and {len(ordered) - len(shown)} more, in the record")
    return lines


def _finding(finding: Finding) -> str:
    return clean(f"{finding.kind or finding.leg or 'note'}: {finding.message}", 300)


def _types(types: Mapping[str, int]) -> str | None:
    ordered = sorted(types.items(), key=lambda item: -item[1])
    return " ".join(f"{name}:{count}" for name, count in ordered[:8]) or None


def _settings(engine: EngineSubject) -> str:
    """What differs from llama.cpp's own defaults, and the threads, which have none."""
    defaults = EngineSettings().model_dump(mode="json")
    settings = dict(engine.settings)
    name, threads = settings.pop("name", None), settings.pop("threads", None)
    changed = [f"{key} {value}" for key, value in settings.items() if value != defaults.get(key)]
    parts = [", ".join(changed) or "llama.cpp's defaults", counted(threads, "thread") if threads else None]
    return _joined([str(name) if name else None, *parts])


def _machine(machine: Mapping[str, Any]) -> str:
    flags, memory = machine.get("flags"), machine.get("memory_bytes")
    parts = [
        ("", "cpu", ""), ("", "cores", " cores"), ("", "system", ""), ("Python ", "python", ""),
        ("diffharness ", "diffharness", ""),
    ]  # fmt: skip
    told = [f"{before}{machine[key]}{after}" if machine.get(key) else None for before, key, after in parts]
    told.insert(1, " ".join(map(str, flags)) if isinstance(flags, list) else None)
    told.insert(3, size(memory) if isinstance(memory, int) and memory else None)
    return _joined(told)


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
