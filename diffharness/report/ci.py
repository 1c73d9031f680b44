"""A gate for CI systems: JUnit's XML, and the workflow commands that GitHub turns into annotations.

What a rule quotes from a file passes through `clean`, so that neither format sees control characters; XML is escaped
by the library, workflow commands as GitHub's toolkit does it (`%`, line ends, and in properties `:` and `,`).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from diffharness.records.gate import GateRecord, RuleRow
from diffharness.report._format import clean
from diffharness.report.gate import limit, measured

_LONGEST = 1000  # characters of one message
_SUITE = "diffharness.gate"


def to_junit(record: GateRecord) -> str:
    """One test case per rule: a rule that fails is a failure, one that had to run and could not is an error."""
    failures = sum(rule.status == "fail" for rule in record.rules)
    missing = [rule for rule in record.rules if rule.status == "not_run"]
    counts = {
        "tests": str(len(record.rules)),
        "failures": str(failures),
        "errors": str(sum(not rule.optional for rule in missing)),
        "skipped": str(sum(rule.optional for rule in missing)),
        "time": f"{record.timings.get('total', 0.0):.3f}",
    }
    root = ET.Element("testsuites", {"name": _SUITE, **{k: v for k, v in counts.items() if k != "skipped"}})
    suite = ET.SubElement(root, "testsuite", {"name": clean(record.subject.artifact.path), **counts})
    properties = ET.SubElement(suite, "properties")
    for name, value in (("gate", record.gate), ("outcome", record.outcome), ("again", record.repro)):
        ET.SubElement(properties, "property", {"name": name, "value": clean(value, _LONGEST)})
    for rule in record.rules:
        case = ET.SubElement(suite, "testcase", {"classname": _SUITE, "name": clean(rule.name), "time": "0"})
        _outcome(case, rule)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join((_DECLARATION, "\n"))


_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


def _outcome(case: ET.Element, rule: RuleRow) -> None:
    line = clean(_line(rule), _LONGEST)
    if rule.status == "pass":
        ET.SubElement(case, "system-out").text = line
        return
    kind = "failure" if rule.status == "fail" else "skipped" if rule.optional else "error"
    attributes = {"message": line} if kind == "skipped" else {"message": line, "type": rule.status}
    found = ET.SubElement(case, kind, attributes)
    if kind != "skipped":
        found.text = "\n".join([line, *(clean(offender, _LONGEST) for offender in rule.offenders)])


def _line(rule: RuleRow) -> str:
    if rule.status == "not_run":
        return f"not run: {rule.message}"
    return f"{measured(rule)}, limit {limit(rule)}: {rule.message}"


def to_annotations(record: GateRecord) -> str:
    """A line for each rule that does not pass, and one for the whole."""
    lines = []
    for rule in record.rules:
        if rule.status != "pass":
            level = "error" if rule.status == "fail" or not rule.optional else "warning"
            lines.append(_command(level, f"gate: {rule.name}", _line(rule)))
    level = "notice" if record.outcome == "pass" else "error"
    lines.append(_command(level, f"gate: {record.outcome}", f"{record.subject.artifact.path}: {record.summary}"))
    return "\n".join(lines) + "\n"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_property(clean(title))}::{_data(clean(message, _LONGEST))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
