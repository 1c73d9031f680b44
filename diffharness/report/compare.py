"""What a comparison of two saved runs prints: what is unlike, both verdicts, and where captures differ."""

from __future__ import annotations

from diffharness.records.compare import CaptureRow, CompareRecord, RunSide
from diffharness.records.run import Score
from diffharness.report._format import NONE, decimals, percent, scientific
from diffharness.report.document import Document, Section, Table
from diffharness.words import listed

_TAPS = 12
_POSITIONS = 12
_NAMES = 8


def document(record: CompareRecord) -> Document:
    """The report, for a terminal of 100 columns and for Markdown."""
    sections = [Section(pairs=_sides(record)), Section("Captures", tables=[_captures(record)], words=2)]
    for row in record.captures:
        if not row.ok:
            sections += _where(row)
    scores = _scores(record)
    if scores is not None:
        sections.append(Section("Perplexity", tables=[scores]))
    if record.unlike:
        table = Table("", ("what", "A", "B"), [(u.what, str(u.a), str(u.b)) for u in record.unlike])
        sections.append(Section("Not the same in both", tables=[table], words=3))
    remarks = _remarks(record)
    if remarks:
        sections.append(Section("Not compared", remarks=remarks))
    commands = [("Reproduce", record.repro)] if record.repro else []
    return Document("compare", "pass" if record.outcome == "same" else "fail", record.summary, sections, commands)


def _sides(record: CompareRecord) -> list[tuple[str, str]]:
    return [(name, _side(side)) for name, side in (("A", record.a), ("B", record.b))]


def _side(side: RunSide) -> str:
    found = side.first_divergence
    parts = [side.path, side.engine, f"verdict {side.verdict}"]
    if found is not None:
        parts.append(f"first divergence {found.tap}" + ("" if found.token is None else f", token {found.token}"))
    return " · ".join(part for part in parts if part)


def _captures(record: CompareRecord) -> Table:
    head = ("capture", "", "tokens", "taps", "first tap", "token", "logits NMSE", "mean KL", "top-1")
    rows = []
    for row in record.captures:
        logits = row.logits
        numbers = (
            (NONE, NONE, NONE)
            if logits is None
            else (scientific(logits.nmse), scientific(logits.kl_mean), percent(logits.top1))
        )
        token = NONE if row.first_token is None else str(row.first_token)
        state = "ok" if row.ok else "fails" if row.taps else "nothing in common"
        rows.append((row.name, state, str(row.n_tokens), str(len(row.taps)), row.first_tap or NONE, token, *numbers))
    return Table("", head, rows)


def _where(row: CaptureRow) -> list[Section]:
    sections = []
    failing = [tap for tap in row.taps if not tap.ok]
    if failing:
        cells = [
            (
                tap.tap,
                scientific(tap.nmse),
                scientific(tap.max_abs),
                NONE if tap.first_token is None else str(tap.first_token),
                NONE if tap.worst_token is None else str(tap.worst_token),
                scientific(tap.worst_token_nmse),
            )
            for tap in failing[:_TAPS]
        ]
        head = ("tap", "NMSE", "max abs", "first token", "worst token", "its NMSE")
        title = f"{row.name}: {_first(len(cells), len(failing))} of {len(row.taps)} taps that differ, in graph order"
        sections.append(Section(title, tables=[Table("", head, cells)]))
    if row.positions:
        places = [(str(p.token), scientific(p.nmse), scientific(p.kl), "same" if p.top1 else "other")
                  for p in row.positions[:_POSITIONS]]  # fmt: skip
        count = _first(len(places), row.n_positions)
        title = f"{row.name}: {count} of {row.n_tokens} positions whose logits differ, the worst first"
        sections.append(Section(title, tables=[Table("", ("token", "NMSE", "KL", "top-1"), places)]))
    return sections


def _first(shown: int, of: int) -> str:
    return str(of) if shown == of else f"{shown} of the {of}"


def _scores(record: CompareRecord) -> Table | None:
    rows = []
    for label, a, b in (
        ("reference on", record.a.reference_scores, record.b.reference_scores),
        ("engine:", record.a.engine_scores, record.b.engine_scores),
    ):
        rows += [(f"{label} {name}", _ppl(a.get(name)), _ppl(b.get(name))) for name in dict.fromkeys([*a, *b])]
    return Table("", ("", "A", "B"), rows) if rows else None


def _ppl(score: Score | None) -> str:
    return NONE if score is None else decimals(score.ppl)


def _remarks(record: CompareRecord) -> list[str]:
    told = [f"only A has the capture {name}" for name in record.only_a]
    told += [f"only B has the capture {name}" for name in record.only_b]
    for row in record.captures:
        if row.unmatched:
            told.append(f"{row.name}: not in both, or of another width: {listed(row.unmatched, _NAMES)}")
    return told
