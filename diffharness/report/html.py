"""The whole record on one page that needs nothing else: no scripts, no fonts, no links out."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, StrictUndefined, Template

from diffharness.records import RunRecord
from diffharness.report import _content, engines, noise
from diffharness.report._content import Table
from diffharness.report._format import clean, decimals, scientific

_MOST_TENSORS = 200

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>diffharness: {{ verdict.primary }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; border-bottom: 1px solid #8884 }
table.numeric th + th, table.numeric td + td { text-align: right }
code, pre { font-family: ui-monospace, monospace; font-size: .92em; white-space: pre-wrap; overflow-wrap: anywhere }
.whole { white-space: nowrap }
.bad { color: #a40000; font-weight: 600 } .good { color: #116611 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #16181a } .whole { white-space: nowrap }
.bad { color: #ff8a80 } .good { color: #8fd18f } }
</style>
</head>
<body>
<h1>Verdict: <span class="{{ 'good' if verdict.primary == 'agree' else 'bad' }}">{{ verdict.primary }}</span></h1>
<p>{{ summary }}</p>
{% if divergence %}<p>{{ divergence }}</p>{% endif %}
{% if affected %}<p>Affected: {{ affected }}</p>{% endif %}
{% for label, text in spread %}<p>{{ label }}: {{ text }}</p>
{% endfor %}{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="table"><table{% if table.numeric %} class="numeric"{% endif %}>
<thead><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td class="{{ 'bad' if cell in ('fail', 'fails') else 'good' if cell in ('pass', 'ok') }}{{ ' whole' if cell|length < 26 }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{% if findings %}<h2>Findings</h2>
<ul>{% for line in findings %}<li>{{ line }}</li>
{% endfor %}</ul>{% endif %}
{% for label, command in commands %}<h2>{{ label }}</h2>
<pre>{{ command }}</pre>
{% endfor %}
</body>
</html>
"""  # noqa: E501


def to_html(record: RunRecord) -> str:
    """One HTML page. Every string is escaped by the template engine, whatever file it came from."""
    verdict = record.verdict
    commands = [("Next step", verdict.next_step), ("Reproduce", record.repro)]
    return _page().render(
        verdict=verdict,
        summary=clean(verdict.summary, 2000),
        divergence=_content.divergence(record),
        affected=_content.affected(record),
        spread=_content.spread(record),
        tables=_tables(record),
        findings=_content.findings(record),
        commands=[(label, clean(command, _content.COMMAND)) for label, command in commands if command],
    )


@cache
def _page() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)


def _tables(record: RunRecord) -> list[Table]:
    graph, artifact = record.legs.graph, record.legs.artifact
    tables = [
        Table("Subject", ("", ""), [(label, text) for label, text in _content.subject(record)]),
        _content.legs(record),
        Table("Perplexity", ("of", "value"), [(name, value) for name, value in _content.scores(record)], numeric=True),
        engines.table(record),
        Table("Of the engines", ("engine", ""), engines.notes(record)),
        _content.worst_taps(record),
        Table(
            "Layers",
            ("layer", "kind", "worst local NMSE", "at", ""),
            [
                (str(row.layer), clean(row.kind), scientific(row.nmse_local), clean(row.tap or ""), _word(row.ok))
                for row in graph.per_layer
            ],
            numeric=True,
        ),
        Table(
            "Positions",
            ("positions", "worst local NMSE", "at", "mean KL", ""),
            [
                (
                    f"{row.start}-{row.stop - 1}",
                    scientific(row.nmse_local),
                    clean(row.tap or ""),
                    scientific(row.kl_mean),
                    _word(row.ok),
                )
                for row in graph.per_position
            ],
            numeric=True,
        ),
        Table("Noise of the native run", ("", ""), noise.pairs(record)),
        noise.layers(record, None),
        Table(
            "Metadata that differ",
            ("key", "artifact", "checkpoint", "read by the forward", "perplexity repaired"),
            [
                (
                    clean(row.key, 120),
                    clean(row.artifact, 120),
                    clean(row.checkpoint, 120),
                    "yes" if row.used else "no",
                    decimals(row.repaired_ppl),
                )
                for row in artifact.metadata
            ],
        ),
        _tensors(record),
        _content.taps(graph.taps, "All taps of the graph leg", graph=True),
        _content.taps(artifact.taps, "All taps of the artifact leg", graph=False),
    ]
    return [table for table in tables if table is not None and table.rows]


def _tensors(record: RunRecord) -> Table:
    rows = record.legs.artifact.tensors
    ranked = sorted(rows, key=lambda row: (not row.damaged, -_over(row.error, row.limit)))[:_MOST_TENSORS]
    return Table(
        f"Tensors against the checkpoint ({len(ranked)} of {len(rows)}, the furthest first)",
        ("tensor", "type", "NMSE", "control", "limit", "cos", ""),
        [
            (
                clean(row.name, 120),
                clean(row.type, 20),
                scientific(row.error),
                scientific(row.control),
                scientific(row.limit),
                decimals(row.cos, 6),
                _word(not row.damaged),
            )
            for row in ranked
        ],
        numeric=True,
    )


def _over(error: float, limit: float) -> float:
    return error / limit if limit > 0 else float("inf")


def _word(ok: bool) -> str:
    return "ok" if ok else "fails"
