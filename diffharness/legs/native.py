"""Local errors of the native run: one bad layer is not blamed on its successors, nor rounding taken for a fault.

The reference goes over the native run's tokens twice, as defined and rounding as the engine does. Both times there are
two streams: one on its own values, whose distance from the engine is what a layer inherited and added, and one that is
set back to the engine's own value at every tap, so that each step of a layer is judged from the very numbers that the
engine had. Measured, rounding leaves 1e-4 to 1e-3 there, and 1e-12 where it is simulated. Set back at layers only, the
few values that fall to another code make more of them with every product, up to 1e-5 by the end of one layer.

Floors: `noise.local` for a tap over all tokens, of which `noise.isolated_share` may be left out as long as each stays
below `noise.local_token`; `noise.local.<tap>` overrides the first for one tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffharness.legs.compare import TapComparison, TapErrors
from diffharness.records import TapRow
from diffharness.records.noise import NativeLayer
from diffharness.settings import Floors
from diffharness.taps import layer_tap, split


def layers(
    defined: TapComparison,
    simulated: TapComparison,
    kinds: Sequence[str],
    expected: Mapping[str, float],
    floors: Floors,
) -> list[NativeLayer]:
    """A row for the embedding, each layer and the head, as far as they were compared.

    `expected` is the NMSE, by tap, of the rounding reference on its own values against the one as defined.
    """
    by_place: dict[tuple[int, str], list[TapErrors]] = {}
    for errors in simulated.taps:
        if errors.local is not None:
            by_place.setdefault(_place(errors.tap, kinds), []).append(errors)
    return [_layer(place, of_place, defined, expected, floors) for place, of_place in sorted(by_place.items())]


def _place(tap: str, kinds: Sequence[str]) -> tuple[int, str]:
    """A key that sorts in graph order: number of the layer, -1 before and `len(kinds)` after all, and its kind."""
    layer, name = split(tap)
    if layer is None:
        return (-1, "embedding") if name == "token_embd" else (len(kinds), "head")
    return layer, kinds[layer] if layer < len(kinds) else "unknown"


def _layer(
    place: tuple[int, str],
    of_place: Sequence[TapErrors],
    defined: TapComparison,
    expected: Mapping[str, float],
    floors: Floors,
) -> NativeLayer:
    number, kind = place
    inside = split(of_place[0].tap)[0]
    rows = [_judged(errors, floors) for errors in of_place]
    failing = [row for row in rows if not row.ok]
    worst = failing[0] if failing else max(rows, key=_local)
    plain = [found.local.nmse() for errors in of_place if (found := defined.get(errors.tap)) and found.local]
    output = {-1: "token_embd"}.get(number, "logits" if inside is None else layer_tap(number, "layer_out"))
    whole = defined.get(output)
    return NativeLayer(
        layer=inside,
        kind=kind,
        nmse_local=_local(worst),
        tap=worst.tap,
        nmse_unsimulated=max(plain, default=None),
        nmse_inherited=whole.own.nmse() if whole is not None and whole.own is not None else None,
        nmse_expected=expected.get(output),
        floor=worst.floor,
        ok=not failing,
        token=worst.first_token,
    )


def _judged(errors: TapErrors, floors: Floors) -> TapRow:
    _, name = split(errors.tap)
    floor = floors.get(f"noise.local.{name}", floors["noise.local"])
    isolated = max(1, int(floors["noise.isolated_share"] * errors.judged.seen.size))
    return errors.row(floor, floors["noise.local_token"], isolated=isolated)


def _local(row: TapRow) -> float:
    value = row.nmse_local
    return float("inf") if value is None or value != value else value
