"""Saved records in any form again: the schema that a record names decides which command's report it gets."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

from diffharness import records
from diffharness.errors import BadInputError
from diffharness.records import Record, RunRecord
from diffharness.records.base import parse, unreadable
from diffharness.report import document as documents
from diffharness.report import html, markdown, terminal

Format = Literal["text", "md", "json", "html"]

_IN_FOLDER = ("run.json", "grade.json", "matrix.json", "explain.json")  # what a run folder's record is called
_LARGEST = 1 << 30  # bytes; the record of a run of a thousand taps and tensors takes 2 MB


def render(path: Path, form: Format) -> str:
    """The record in a file or run folder as text, Markdown, JSON or HTML (which only runs have), with its last newline.

    BadInputError for what is no record, is of another schema version, or has no such form.
    """
    record, name = load_any(path)
    if form == "json":
        return record.to_json() + "\n"
    if isinstance(record, RunRecord):
        of_run: dict[str, Callable[[RunRecord], str]] = {
            "text": terminal.to_text, "md": markdown.to_markdown, "html": html.to_html,
        }  # fmt: skip
        return of_run[form](record)
    if form == "html":
        raise BadInputError(
            f"expected md, json or text as the format of {name}, found html", hint="only the record of `run` has a page"
        )
    document = importlib.import_module(f"diffharness.report.{name}").document(record)
    return documents.to_markdown(document) if form == "md" else documents.to_text(document)


def load_any(path: Path) -> tuple[Record, str]:
    """The record and its command's name, from a file or a run folder."""
    file = _file(path)
    try:
        if file.stat().st_size > _LARGEST:
            raise BadInputError(f"{file} is too large for a record: {file.stat().st_size} bytes")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from error
    schema = _schema(text)
    name = _names().get(schema or "")
    if name is None:
        raise BadInputError(
            f"{file}: expected the record of a command, found {f'schema {schema!r}' if schema else 'none'}",
            hint=f"this version reads {', '.join(sorted(_names()))}",
        )
    return parse(_record(name), text, str(file)), name


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _IN_FOLDER if (path / name).exists()]
    if not found:
        raise BadInputError(
            f"expected a run folder, with {' or '.join(_IN_FOLDER)}: {path} has none of them",
            hint="`diffharness run --out DIR` makes one; or give the file that --json wrote",
        )
    return found[0]


def _schema(text: str) -> str | None:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    return schema if isinstance(schema, str) else None


@cache
def _names() -> dict[str, str]:
    """Command by the schema of its record: every record that has a report."""
    modules = {module.name for module in pkgutil.iter_modules(records.__path__)}
    reports = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])} | {"run"}
    found = {}
    for name in sorted((modules & reports) - {"base", "__main__"}):
        for value in vars(importlib.import_module(f"diffharness.records.{name}")).values():
            if _is_record_of(value, name):
                found[value.model_fields["schema_"].default] = name
    return found


def _is_record_of(value: object, name: str) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, Record)
        and value.__module__ == f"diffharness.records.{name}"
        and "schema_" in value.model_fields
    )


def _record(name: str) -> type[Record]:
    values = vars(importlib.import_module(f"diffharness.records.{name}")).values()
    found: type[Record] = next(value for value in values if _is_record_of(value, name))
    return found
