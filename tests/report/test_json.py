from __future__ import annotations

from diffharness.records import RunRecord, parse_record
from diffharness.report import json as json_report
from diffharness.report import markdown


def test_what_is_written_reads_back_and_renders_the_same(hostile: RunRecord) -> None:
    text = json_report.to_json(hostile)
    assert text.endswith("}\n")
    assert markdown.to_markdown(parse_record(text)) == markdown.to_markdown(hostile)
