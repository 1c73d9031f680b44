"""Hypotheses: small, named ways in which a forward may differ from the model's definition, each a model of its own.

A theme has a module, whose `propose(scene)` gives those of its hypotheses that the model has a use for and that can
show first where the two sides first part. What is tried, and what is made of it, is `legs.explain`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from diffharness.reference.hypotheses import (
    attention,
    branches,
    cache,
    experts,
    feed_forward,
    masks,
    norms,
    rope,
    rope_fitted,
    scaling,
    stated,
    tensors,
    tokens,
)
from diffharness.reference.hypotheses._altering import Seen, altered, only_at
from diffharness.reference.hypotheses._scene import Hypothesis, Place, Propose, Scene

__all__ = ["THEMES", "Hypothesis", "Place", "Scene", "Seen", "altered", "only_at", "proposals"]

THEMES: dict[str, Propose] = {
    "rope": rope.propose,
    "rope, measured": rope_fitted.propose,
    "attention": attention.propose,
    "masks": masks.propose,
    "norms": norms.propose,
    "feed-forward": feed_forward.propose,
    "branches": branches.propose,
    "scaling": scaling.propose,
    "stated": stated.propose,
    "experts": experts.propose,
    "keys and values": cache.propose,
    "tokens": tokens.propose,
    "tensors": tensors.propose,
}


def proposals(scene: Scene) -> Iterator[tuple[str, Hypothesis]]:
    """Theme and hypothesis of all that may begin where the scene is; numbers from tables before fitted ones."""
    fitted = []
    for theme, propose in THEMES.items():
        for hypothesis in _made(propose, scene):
            if not scene.may_begin_at(hypothesis.taps):
                continue
            if hypothesis.fitted:
                fitted.append((theme, hypothesis))
            else:
                yield theme, hypothesis
    yield from fitted


def _made(propose: Propose, scene: Scene) -> Iterator[Hypothesis]:
    """A theme's hypotheses up to one that cannot be made: of heads or taps of another shape than the theme measures."""
    try:
        yield from propose(scene)
    except (RuntimeError, KeyError, IndexError) as error:
        logging.getLogger(__name__).debug("%s: %s", propose.__module__, error)
