"""Router flips of a mixture of experts, counted apart from continuous error.

A token whose two best experts are nearly as likely may take the other one for a rounding error, and its output then
differs by a whole expert: a jump that says nothing about how exactly anything was computed. How many such jumps
rounding alone causes is counted in the reference that rounds as the engine does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffharness.legs.compare import BoolArray, Choice, other_experts
from diffharness.metrics import Float64Array, FloatArray, log_softmax
from diffharness.records.noise import RouterFlip, RouterFlips

MOST = 10  # flips listed
ByLayer = Mapping[int, FloatArray]  # router logits [n_tokens, n_expert]


def flips(
    reference: ByLayer, engine: ByLayer, simulated: ByLayer, choice: Choice, kl: Float64Array
) -> RouterFlips | None:
    """Layers that all three sides have; `kl` [n_tokens] of the reference's distribution to the engine's.

    None where no layer was routed.
    """
    shared = sorted(reference.keys() & engine.keys() & simulated.keys())
    if not shared:
        return None
    by_engine = {il: other_experts(engine[il], reference[il], il, choice) for il in shared}
    touched: BoolArray = np.logical_or.reduce(list(by_engine.values()))
    where = [(il, token) for il in shared for token in np.flatnonzero(by_engine[il]).tolist()]
    found = [_flip(il, token, reference[il], engine[il], choice) for il, token in where]
    return RouterFlips(
        decisions=sum(len(reference[il]) for il in shared),
        flipped=len(found),
        expected=sum(int(other_experts(simulated[il], reference[il], il, choice).sum()) for il in shared),
        worst=sorted(found, key=lambda flip: -flip.margin)[:MOST],
        tokens=int(touched.sum()),
        kl_flipped=_mean(kl[touched]),
        kl_others=_mean(kl[~touched]),
    )


def _flip(il: int, token: int, reference: FloatArray, engine: FloatArray, choice: Choice) -> RouterFlip:
    """Of the experts that differ, the likeliest one dropped and the least likely one taken, by the softmax."""
    p = np.exp(log_softmax(reference[token : token + 1]))[0]
    ours, theirs = (set(choice(il, side[token : token + 1])[0].tolist()) for side in (reference, engine))
    dropped = max(ours - theirs, key=lambda expert: p[expert])
    taken = min(theirs - ours, key=lambda expert: p[expert])
    margin = abs(float(p[dropped] - p[taken]))  # the softmax is not always what they are chosen by
    return RouterFlip(layer=il, token=token, dropped=dropped, taken=taken, margin=margin)


def _mean(values: Float64Array) -> float | None:
    return float(values.mean()) if values.size else None
