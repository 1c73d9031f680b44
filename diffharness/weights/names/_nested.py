"""A text model's tensors inside an image-and-text model, where they stand under other prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from diffharness.weights.names._map import Layout, TensorRule

# What stands there for `model.`, and before the head's name.
PREFIXES = (("language_model.model.", "language_model."), ("model.language_model.", ""))


def with_nested_names(rules: Iterable[TensorRule]) -> list[TensorRule]:
    """The rules with the names under `PREFIXES` as further spellings."""
    return [replace(rule, aliases=(*rule.aliases, *_nested(rule))) for rule in rules]


def _nested(rule: TensorRule) -> Iterator[tuple[tuple[str, ...], Layout]]:
    for body, head in PREFIXES if rule.hf else ():
        names = (body + name.removeprefix("model.") if name.startswith("model.") else head + name for name in rule.hf)
        yield tuple(names), rule.layout


def moved(rules: list[TensorRule], to: str, *others: str) -> list[TensorRule]:
    """The same rules with Hugging Face names that begin with `model.` begin with `to`; spelled, too, as `others`."""
    return [_moved(rule, to, others) for rule in rules]


def _moved(rule: TensorRule, to: str, others: tuple[str, ...]) -> TensorRule:
    def under(prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + part.removeprefix("model.") if part.startswith("model.") else part for part in parts)

    spellings = [(rule.hf, rule.layout), *rule.aliases]
    aliases = {(under(prefix, parts), layout): None for parts, layout in spellings for prefix in (to, *others)}
    first = (under(to, rule.hf), rule.layout)
    return replace(rule, hf=first[0], aliases=tuple(alias for alias in aliases if alias != first))
