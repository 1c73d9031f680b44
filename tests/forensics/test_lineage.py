from __future__ import annotations

from dataclasses import replace

import pytest

from diffharness.forensics.drift import TensorError
from diffharness.forensics.lineage import differs_everywhere

FLOORS = {"artifact.lineage_share": 0.9, "artifact.lineage_alike": 0.1, "artifact.lineage_vector": 0.01}
N_LAYER = 6
LOSS = 5e-3  # of the matrices' type
MATRICES = ("attn_q", "attn_k", "ffn_up", "ffn_down")


def tensor(name: str, excess: float, *, vector: bool = False, exact: bool = False, far_rows: int = 0) -> TensorError:
    control = 0.0 if vector else LOSS
    return TensorError(
        name=name,
        type="F32" if vector else "Q4_K",
        shape=(256,) if vector else (256, 256),
        error=control + excess,
        control=control,
        cos=0.99,
        non_finite=0,
        far_rows=far_rows,
        worst_row=0,
        limit=4 * control + 1e-9,
        exact=exact,
    )


def model(excess, *, norms=lambda layer: 0.0, exact: bool = False) -> list[TensorError]:
    """Tensors with `excess(layer, class)` beyond their control; `exact`: a matrix without excess is the control's."""
    tensors = [tensor("token_embd.weight", 0.0, exact=exact)]
    for il in range(N_LAYER):
        for klass in MATRICES:
            beyond = excess(il, klass)
            tensors.append(tensor(f"blk.{il}.{klass}.weight", beyond, exact=exact and beyond == 0.0))
        tensors.append(tensor(f"blk.{il}.attn_norm.weight", norms(il), vector=True))
    return tensors


def everywhere(tensors: list[TensorError], logits_moved: bool = False) -> bool:
    return differs_everywhere(tensors, FLOORS, logits_moved=logits_moved)


@pytest.mark.parametrize("size", [0.02, 0.5])
def test_another_model_is_far_everywhere(size: float) -> None:
    assert everywhere(model(lambda il, klass: size * (1 + 0.3 * (il % 2)), norms=lambda il: 1e-4))


def test_a_light_fine_tune_is_damage_in_some_types_and_excess_in_all() -> None:
    """Beyond the limit only where the type loses little, and alike below it elsewhere."""
    assert everywhere(model(lambda il, klass: 0.02 if klass == "ffn_down" else 8e-3))


def test_a_lighter_one_shows_in_the_norms() -> None:
    assert everywhere(model(lambda il, klass: 1e-5, norms=lambda il: 1e-6))
    assert not everywhere(model(lambda il, klass: 0.0, norms=lambda il: 1e-6, exact=True)), "the matrices are its own"
    assert not everywhere(model(lambda il, klass: 1e-4, norms=lambda il: 0.06)), "no training moves a norm so far"


def test_norms_of_some_layers_say_so_only_if_the_logits_moved() -> None:
    some = model(lambda il, klass: 1e-4, norms=lambda il: 1e-6 * (il > 3))
    assert everywhere(some, logits_moved=True)
    assert not everywhere(some, logits_moved=False)


def test_excess_without_any_far_tensor() -> None:
    assert everywhere(model(lambda il, klass: 5e-4 if klass != "attn_q" else 3e-4), logits_moved=True)
    assert not everywhere(model(lambda il, klass: 0.0, exact=True), logits_moved=True)


@pytest.mark.parametrize("background", [0.0, 1e-3])
def test_damage_stands_out(background: float) -> None:
    """Also where importance weights gave every other tensor a little more error than the control has."""
    one = lambda il, klass: 0.09 if (il, klass) == (3, "ffn_up") else background  # noqa: E731
    layer = lambda il, klass: 0.4 if il == 3 else background  # noqa: E731
    two_thirds = lambda il, klass: 0.4 if il % 6 > 1 else background  # noqa: E731
    for excess in (one, layer, two_thirds):
        assert not everywhere(model(excess, exact=background == 0.0), logits_moved=True)


def test_a_corrupt_block_is_no_training() -> None:
    tensors = model(lambda il, klass: 1e-3)
    tensors[5] = tensor("blk.0.ffn_up.weight", 2e-3, far_rows=1)
    assert not everywhere(tensors, logits_moved=True)


def test_nothing_is_no_other_model() -> None:
    assert not everywhere([])
    assert not everywhere([tensor("blk.0.attn_norm.weight", 1e-4, vector=True)])


def placed(misplaced, *, accepted: float = 0.002 * LOSS) -> list[TensorError]:
    """Matrices with errors that importance weights doubled, `misplaced(layer, class)` of it beside the levels."""
    tensors = []
    for t in model(lambda il, klass: LOSS):
        beyond = misplaced(t.layer, t.klass.removesuffix(".weight")) if t.is_matrix else None
        if beyond is not None:
            t = replace(
                t,
                misplaced=beyond,
                misplaced_usual=accepted,
                why=("levels",) if beyond > max(0.1 * LOSS, 2 * accepted) else (),
            )
        tensors.append(t)
    return tensors


def test_the_error_beside_the_levels_tells_training_from_importance() -> None:
    assert everywhere(placed(lambda il, klass: 0.2 * LOSS * (1 + (il or 0) % 2)))
    assert everywhere(placed(lambda il, klass: 0.3 * LOSS if klass == "ffn_down" else 0.05 * LOSS))
    assert not everywhere(placed(lambda il, klass: 0.0)), "twice the control's error, and nothing beside the levels"
    assert not everywhere(placed(lambda il, klass: 3 * LOSS if (il, klass) == (3, "ffn_up") else 0.0))
    some = lambda il, klass: 3 * LOSS if (il, klass) == (3, "ffn_up") else 0.4 * LOSS  # noqa: E731
    assert not everywhere(placed(some, accepted=0.5 * LOSS)), "Q4_0 leaves a part of it whatever the weights are"


def test_types_in_which_training_does_not_show_do_not_count_against_it() -> None:
    """Half of the matrices in Q5_0, whose levels importance weights blur by more than the training moved them."""
    tensors = placed(lambda il, klass: 0.3 * LOSS)
    blurred = [
        replace(t, misplaced_usual=1.2 * LOSS, why=()) if t.klass in ("attn_q.weight", "attn_k.weight") else t
        for t in tensors
    ]
    assert everywhere(blurred)
    one = [t if t.name == "blk.3.ffn_up.weight" else replace(t, misplaced=0.0, why=()) for t in tensors]
    assert not everywhere([t if t.is_matrix else tensor(t.name, 0.0, vector=True) for t in one])


def test_scalars_that_training_left_alone() -> None:
    scalars = [replace(tensor(f"blk.{il}.layer_output_scale.weight", 0.0, vector=True), shape=(1,)) for il in range(6)]
    assert everywhere(model(lambda il, klass: 1e-5, norms=lambda il: 1e-6) + scalars)


def test_one_row_that_is_far_by_chance_does_not_speak_against_it() -> None:
    """A little training, of which a single tensor is damaged in one row only."""
    tensors = placed(lambda il, klass: 0.09 * LOSS if klass == "attn_q" else 0.2 * LOSS)
    assert everywhere([replace(t, far_rows=1) if t.name == "blk.2.attn_q.weight" else t for t in tensors])
    sound = placed(lambda il, klass: 0.01 * LOSS if (il, klass) == (2, "attn_q") else 0.0)
    assert not everywhere([replace(t, far_rows=1) if t.name == "blk.2.attn_q.weight" else t for t in sound])
