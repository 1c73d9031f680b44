from __future__ import annotations

import numpy as np
import pytest

from diffharness.legs import router
from diffharness.legs.compare import highest

N, EXPERTS = 20, 6
LOGITS = {il: np.random.default_rng(il).standard_normal((N, EXPERTS)).astype(np.float32) for il in (1, 2)}
KL = np.full(N, 1e-4)


def exchanged(layer: int, token: int) -> dict[int, np.ndarray]:
    """The router's second and third choice of one token changed places."""
    changed = {il: values.copy() for il, values in LOGITS.items()}
    second, third = np.argsort(-LOGITS[layer][token])[1:3]
    changed[layer][token, [second, third]] = LOGITS[layer][token, [third, second]]
    return changed


def test_nothing_flips_between_like_routers() -> None:
    nearly = {il: values * 1.001 for il, values in LOGITS.items()}
    found = router.flips(LOGITS, nearly, LOGITS, highest(2), KL)
    assert found is not None
    assert (found.decisions, found.flipped, found.expected, found.tokens) == (2 * N, 0, 0, 0)
    assert found.kl_flipped is None and found.kl_others == pytest.approx(1e-4)


def test_a_flip_is_counted_with_its_experts_margin_and_share_of_the_error() -> None:
    kl = KL.copy()
    kl[7] = 0.5
    found = router.flips(LOGITS, exchanged(2, 7), exchanged(1, 3), highest(2), kl)
    assert found is not None
    assert (found.flipped, found.expected, found.tokens) == (1, 1, 1)
    assert found.kl_flipped == pytest.approx(0.5) and found.kl_others == pytest.approx(1e-4)
    [flip] = found.worst
    second, third = np.argsort(-LOGITS[2][7])[1:3]
    p = np.exp(LOGITS[2][7]) / np.exp(LOGITS[2][7]).sum()
    assert (flip.layer, flip.token, flip.dropped, flip.taken) == (2, 7, second, third)
    assert flip.margin == pytest.approx(p[second] - p[third], rel=1e-4)


def test_an_exchange_within_the_chosen_is_no_flip() -> None:
    found = router.flips(LOGITS, exchanged(2, 7), LOGITS, highest(3), KL)
    assert found is not None and found.flipped == 0


def test_layers_that_one_side_lacks_are_left_out() -> None:
    found = router.flips(LOGITS, {2: LOGITS[2]}, LOGITS, highest(2), KL)
    assert found is not None and found.decisions == N
    assert router.flips(LOGITS, {}, LOGITS, highest(2), KL) is None


def test_a_choice_may_rest_on_more_than_the_logits() -> None:
    """With a bias that outweighs all logits nothing flips, whatever becomes of these."""

    def choice(layer: int, logits: np.ndarray) -> np.ndarray:
        return np.argsort(-(logits + 100 * np.arange(EXPERTS)), axis=1, kind="stable")[:, :2]

    found = router.flips(LOGITS, exchanged(2, 7), LOGITS, choice, KL)
    assert found is not None and found.flipped == 0
