"""The form of a recipe: globs over tensor names, each with a scheme; the first that matches wins.

    about: int8 for the down projection, int4 for the rest
    tensors:
      "*ffn_down*": {bits: 8, block: 32}
      "*": {bits: 4, block: 32, asymmetric: true}
    otherwise: F16

A scheme is either a type of ggml's (`Q4_K`) or an integer of 2 to 8 bits in blocks of a row. `otherwise`, one scheme
or a list of which the first that fits is taken, is for tensors whose rows are not made of whole blocks of their own
scheme; without it such a tensor is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from diffharness.weights.dequant import BLOCKS, dequantizable

PLAIN = ("F32", "F16", "BF16")  # a cast, not a quantization
_NOT_FOR_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64"})
_SCALE_BITS = 16  # scales and minima are stored in float16


def ggml_types() -> tuple[str, ...]:
    """The types of ggml's that a recipe can name."""
    return tuple(name for name in dequantizable() if name not in _NOT_FOR_WEIGHTS)


def _known(name: str) -> str:
    if name.upper() not in ggml_types():
        raise ValueError(f"no such type {name!r}; known: {', '.join(ggml_types())}")
    return name.upper()


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value


class IntN(BaseModel):
    """Integers of `bits` bits, with a float16 scale (asymmetric: and minimum) for each `block` values of a row.

    `blocks.round_to_blocks` has the formulas.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Annotated[int, Field(strict=True, ge=2, le=8)]
    block: Literal[16, 32, 64, 128]
    asymmetric: Annotated[bool, BeforeValidator(_flag)] = False


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _kind(value: Any) -> str | None:
    if isinstance(value, IntN | Mapping):
        return "integer"
    return "type" if isinstance(value, str) else None


Scheme = Annotated[
    Annotated[Annotated[str, AfterValidator(_known)], Tag("type")] | Annotated[IntN, Tag("integer")],
    Discriminator(
        _kind,
        custom_error_type="scheme",
        custom_error_message="expected a ggml type such as Q4_K, or {bits: 4, block: 32}",
    ),
]


class Recipe(BaseModel):
    """One way to store a model's tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    about: str = ""
    tensors: Annotated[dict[str, Scheme], Field(min_length=1)]  # glob over GGUF names -> scheme
    otherwise: Annotated[tuple[Scheme, ...], BeforeValidator(_listed)] = ()  # the first that fits


def name_of(scheme: str | IntN) -> str:
    """`Q4_K`, `int4 block 32`, `int4 block 32 asymmetric`."""
    if isinstance(scheme, str):
        return scheme
    return f"int{scheme.bits} block {scheme.block}" + (" asymmetric" if scheme.asymmetric else "")


def block_of(scheme: str | IntN) -> int:
    """Values of a row that are stored together."""
    return BLOCKS[scheme][0] if isinstance(scheme, str) else scheme.block


def bits_of(scheme: str | IntN) -> float:
    """Bits per weight, scales and minima included."""
    if isinstance(scheme, str):
        n, size = BLOCKS[scheme]
        return 8 * size / n
    return scheme.bits + _SCALE_BITS * (2 if scheme.asymmetric else 1) / scheme.block
