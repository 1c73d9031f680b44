"""JUnit XML and GitHub's workflow commands: one entry per rule, whatever a file's strings hold."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from diffharness.forensics.gate import NotRun
from diffharness.records.gate import GateRecord
from diffharness.records.legs import TokensLeg
from diffharness.report.ci import to_annotations, to_junit
from tests.forensics.gate.evidence import graded
from tests.report.conftest import EVIL
from tests.report.test_gate import record

HOSTILE = EVIL + " ]]> &amp; \x00\x0b\ufffe\ud800 %0A::error::forged\n::error::forged"


def hostile() -> GateRecord:
    leg = TokensLeg(status="fail", reason=HOSTILE)
    found = record(HOSTILE, tokens=leg)
    found.rules[0].offenders = [HOSTILE]
    return found


def test_a_case_per_rule() -> None:
    root = ET.fromstring(to_junit(record()))
    (suite,) = root.findall("testsuite")
    assert (root.tag, suite.get("name")) == ("testsuites", "m.gguf")
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")}
    assert counts == {"tests": "13", "failures": "0", "errors": "0", "skipped": "0", "time": "1.250"}
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [row.name for row in record().rules]
    assert all(case.get("classname") == "diffharness.gate" and case.get("time") for case in cases)
    assert {p.get("name"): p.get("value") for p in suite.iter("property")}["outcome"] == "pass"


def test_failures_errors_and_skipped_are_told_apart() -> None:
    found = record(grade=graded(ratio=1.3), tokens=NotRun("no text"))
    optional = found.rules[-1]
    optional.status, optional.optional = "not_run", True
    root = ET.fromstring(to_junit(found))
    (suite,) = root.findall("testsuite")
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["13", "1", "1", "1"]
    kinds = {case.get("name"): [child.tag for child in case] for case in suite.findall("testcase")}
    assert kinds["perplexity (4 bits and up)"] == ["failure"]
    assert kinds["tokens"] == ["error"] and kinds["engine"] == ["skipped"] and kinds["finite"] == ["system-out"]
    failure = next(suite.iter("failure"))
    assert "30%, limit <= 15%" in str(failure.get("message")) and failure.get("type") == "fail"


def test_xml_is_valid_whatever_the_strings_hold() -> None:
    text = to_junit(hostile())
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites ')
    ET.fromstring(text.encode("utf-8"))
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff\u202e]", text)


def test_annotations_are_one_line_each() -> None:
    lines = to_annotations(record(grade=graded(ratio=1.3), tokens=NotRun("no text"))).splitlines()
    assert [line.split("::")[1] for line in lines] == [
        "error title=gate%3A tokens",
        "error title=gate%3A perplexity (4 bits and up)",
        "error title=gate%3A fail",
    ]
    assert lines[1].endswith("::30%25, limit <= 15%25: perplexity 2.6000, the checkpoint's 2.0000 (+30.00 ± 0.01 %25)")


def test_a_pass_is_a_notice_and_an_optional_rule_a_warning() -> None:
    assert to_annotations(record()) == "::notice title=gate%3A pass::m.gguf: 13 rules pass\n"
    found = record()
    found.rules[0].status, found.rules[0].optional = "not_run", True
    assert to_annotations(found).startswith("::warning title=gate%3A finite::not run: ")


def test_no_string_forges_an_annotation() -> None:
    text = to_annotations(hostile())
    assert "\x1b" not in text and "\x00" not in text and len(text.splitlines()) == 2
    assert all(line.startswith("::error title=gate%3A ") for line in text.splitlines())
    assert "%250A::error::forged" in text
