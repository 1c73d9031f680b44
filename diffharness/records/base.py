"""What every record is made of: numbers that JSON has no word for, plain values, strict models, and reading one back.

Numbers that are infinite or not a number are written as the strings "inf", "-inf" and "nan", and read back as floats;
inside `evidence` they stay strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, WithJsonSchema

from diffharness.errors import BadInputError


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


Number = Annotated[
    float,
    PlainSerializer(_json_number, return_type=float | str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}),
]
"""A float that may be infinite or not a number."""


def plain(value: object) -> Any:
    """`value` in JSON's own types: numpy scalars and arrays unpacked, tuples as lists, inf and nan as strings."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _json_number(float(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy, which this layer does not import
        return plain(value.tolist())
    return str(value)


Plain = Annotated[Any, BeforeValidator(plain)]
PlainDict = Annotated[dict[str, Any], BeforeValidator(plain)]
"""A JSON object of any content; Python and numpy values are made plain on the way in."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, serialize_by_alias=True)


class Record(Part):
    """A whole document. Its `schema_` names the kind and version; fields may be added under one, none renamed."""

    def to_json(self, *, indent: int | None = 2) -> str:
        """The record as JSON text, strictly within the standard."""
        return json.dumps(self.model_dump(mode="json"), indent=indent, allow_nan=False, ensure_ascii=False)


R = TypeVar("R", bound=Record)
_HINT = "`diffharness run --out DIR` makes a folder with one, and --json writes one"


def parse(model: type[R], text: str, where: str) -> R:
    """A record back from its JSON; BadInputError if it is none, or of another schema."""
    schema = model.model_fields["schema_"].default
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{where}: expected a JSON run record, found text that is not JSON ({error})", hint=_HINT
        ) from error
    found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
    if found != schema:
        raise BadInputError(
            f"{where}: expected schema {schema!r}, found {found!r}",
            hint="make the run again with this version, or read it with the version that wrote it",
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInputError(
            f"{where}: not a valid {schema} record: {place}: {first['msg']} ({error.error_count()} problems)"
        ) from error


def unreadable(file: Path, error: OSError | UnicodeDecodeError) -> BadInputError:
    """The error for a record that cannot be read from its file."""
    why = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
    return BadInputError(f"cannot read the record {file}: {why}", hint=_HINT)


def load(model: type[R], file: Path) -> R:
    """The record in a file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from error
    return parse(model, text, str(file))
