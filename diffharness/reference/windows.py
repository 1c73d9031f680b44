"""Which layers slide, where an architecture has a pattern of its own for files that do not list them."""

from __future__ import annotations

from diffharness.reference.hparams import HyperParameters


def sliding_layers(hp: HyperParameters, n_layer: int, period: int, *, global_first: bool = False) -> tuple[bool, ...]:
    """For each layer whether it slides, by `attention.sliding_window_pattern`.

    The key holds a truth value per layer, or the length of a period (absent: `period`) whose last layer, or with
    `global_first` its first, sees everything; 0 means that all slide.
    """
    pattern = hp.metadata.get(hp.key("attention.sliding_window_pattern"), period)
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        of_all = 0 if global_first else pattern - 1
        return tuple(pattern == 0 or il % pattern != of_all for il in range(n_layer))
    return hp.booleans("attention.sliding_window_pattern", n_layer)


def windows(hp: HyperParameters, n_layer: int, window: int, period: int) -> tuple[int | None, ...]:
    """Each layer's window by `sliding_layers`, None where it sees all earlier tokens; a `window` of 0 is none."""
    return tuple(window if window > 0 and slides else None for slides in sliding_layers(hp, n_layer, period))
