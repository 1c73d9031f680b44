"""The runner: chunks, streams, what is read when, and what reaches the listener."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from diffharness import taps
from diffharness.errors import ArtifactFileError, FixtureError, SettingsError
from diffharness.reference import runner
from diffharness.reference.model import State
from diffharness.reference.runner import Reference
from diffharness.reference.weights import SourceWeights
from tests.reference.random_source import LLAMA, QWEN3MOE, RandomSource

N_LAYER, N_EMBD, N_VOCAB = 3, 24, 40


def ids(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n)


def logits_of(reference: Reference, chunks: list[Any], **more: Any) -> torch.Tensor:
    logits = reference.run(chunks, **more)
    assert logits is not None
    return logits


class Heard:
    """A listener that keeps everything, whole."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.order: list[str] = []
        self.own: dict[str, torch.Tensor] = {}
        self.local: dict[str, torch.Tensor] = {}
        self.rows: dict[str, list[slice]] = {}

    def __call__(self, name: str, own: torch.Tensor, local: torch.Tensor | None, rows: slice) -> None:
        if name not in self.own:
            self.order.append(name)
            self.own[name] = torch.full((self.n_tokens, own.shape[-1]), torch.nan)
        self.own[name][rows] = own
        self.rows.setdefault(name, []).append(rows)
        if local is not None:
            self.local.setdefault(name, torch.full((self.n_tokens, own.shape[-1]), torch.nan))[rows] = local


# -- chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [LLAMA, QWEN3MOE], ids=["llama", "qwen3moe"])
def test_chunks_are_independent_whatever_their_lengths(metadata: dict[str, Any]) -> None:
    reference = Reference(RandomSource(metadata))
    chunks = [ids(9), ids(9, 1), ids(5, 2), ids(9, 3)]
    together = logits_of(reference, chunks)
    assert together.shape == (32, N_VOCAB)
    alone = torch.cat([logits_of(reference, [chunk]) for chunk in chunks])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_chunk_starts_at_an_empty_context_and_looks_only_back() -> None:
    reference = Reference(RandomSource(LLAMA))
    whole, half = ids(12), ids(12)[:6]
    assert torch.allclose(logits_of(reference, [whole])[:6], logits_of(reference, [half]), atol=1e-5)


def test_weights_are_read_once_for_all_groups_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [ids(8, seed) for seed in range(5)]
    expected = logits_of(Reference(RandomSource(LLAMA)), chunks)
    monkeypatch.setattr(runner, "_GROUP_TOKENS", 16)
    source = RandomSource(LLAMA)
    found = logits_of(Reference(source), chunks)
    assert torch.allclose(found, expected, atol=1e-5)
    assert set(Counter(source.reads).values()) == {1}
    assert {name for name in source.values if name.startswith("blk.")} <= set(source.reads)


def test_embedding_and_head_are_never_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffharness.reference.ops._HEAD_BYTES", 10 * N_EMBD * 4)
    source = RandomSource(LLAMA, drop=("output.weight",))  # head tied
    logits_of(Reference(source), [np.array([3, 3, 7, 3])])
    assert "token_embd.weight" not in source.reads
    taken = [n for name, n in source.takes if name == "token_embd.weight"]
    assert taken == [2, 10, 10, 10, 10]


def test_only_routed_experts_are_read() -> None:
    source = RandomSource(QWEN3MOE)
    heard = Heard(2)
    Reference(source).run([ids(2)], on_tap=heard)
    for il in range(N_LAYER):
        routed = heard.own[f"blk.{il}.moe_logits"].topk(2).indices.unique().tolist()
        name = f"blk.{il}.ffn_down_exps.weight"
        assert [n for n, count in source.takes if n == name and count == 1] == [name] * len(routed)
        assert name not in source.reads


# -- taps ----------------------------------------------------------------------------------------------


BEHIND = ("attn_ctx", "attn_out", "ffn_in", "ffn_norm")  # what attention makes, one after another
DENSE, SPARSE = ("ffn_up", "ffn_act", "ffn_out"), ("moe_logits", "moe_experts", "ffn_out")
BRANCHES = (("attn_q", "attn_q_norm", "attn_q_rope"), ("attn_k", "attn_k_norm", "attn_k_rope"), ("attn_v",))


def chains(order: list[str], feed_forward: tuple[str, ...]) -> None:
    """Each tap comes once, and behind those that it depends on; what does not depend on each other may come anyhow."""
    assert len(set(order)) == len(order)
    for branch in BRANCHES:
        within = ("attn_norm", *branch, *BEHIND, *feed_forward, "layer_out")
        found = [name for name in order if taps.split(name)[1] in ("token_embd", *within, "output_norm", "logits")]
        assert found == sorted(found, key=taps.graph_order)
        assert {branch[-1], *BEHIND, *feed_forward} <= {taps.split(name)[1] for name in found}


def test_taps_come_in_order_of_computation_and_with_their_widths() -> None:
    heard = Heard(6)
    logits = Reference(RandomSource(LLAMA)).run([ids(6)], on_tap=heard)
    chains(heard.order, DENSE)
    widths = {taps.split(name)[1]: value.shape[-1] for name, value in heard.own.items()}
    assert widths == {
        "token_embd": 24, "attn_norm": 24, "attn_q": 32, "attn_q_rope": 32, "attn_k": 16, "attn_k_rope": 16,
        "attn_v": 16, "attn_ctx": 32, "attn_out": 24, "ffn_in": 24, "ffn_norm": 24, "ffn_gate": 20, "ffn_up": 20,
        "ffn_act": 20, "ffn_out": 24, "layer_out": 24, "output_norm": 24, "logits": 40,
    }  # fmt: skip
    assert len(heard.order) == 3 + N_LAYER * 15
    assert torch.equal(heard.own["logits"], logits)


def test_taps_of_experts_and_head_norms() -> None:
    heard = Heard(6)
    Reference(RandomSource(QWEN3MOE)).run([ids(6)], on_tap=heard)
    chains(heard.order, SPARSE)
    assert {"attn_q_norm", "attn_k_norm", "moe_logits", "moe_experts", "ffn_out"} <= {
        taps.split(name)[1] for name in heard.order
    }
    assert heard.own["blk.1.moe_logits"].shape == (6, 8)


def test_only_wanted_taps_and_rows_that_cover_the_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_GROUP_TOKENS", 8)
    heard = Heard(13)
    Reference(RandomSource(LLAMA)).run([ids(4), ids(4), ids(5)], on_tap=heard, taps=["attn_ctx", "logits"])
    assert heard.order == [*(f"blk.{il}.attn_ctx" for il in range(N_LAYER)), "logits"]
    assert heard.rows["blk.0.attn_ctx"] == [slice(0, 8), slice(8, 13)]
    assert not any(value.isnan().any() for value in heard.own.values())


def test_logits_in_pieces_when_nobody_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(RandomSource(LLAMA))
    expected = logits_of(reference, [ids(100), ids(50)])
    monkeypatch.setattr(runner, "_LOGITS_BYTES", 1)
    heard = Heard(150)
    assert reference.run([ids(100), ids(50)], on_tap=heard, taps=["logits"], keep_logits=False) is None
    assert heard.rows["logits"] == [slice(0, 64), slice(64, 128), slice(128, 150)]
    assert torch.allclose(heard.own["logits"], expected, atol=1e-5)


# -- teacher forcing -----------------------------------------------------------------------------------


def as_inputs(heard: Heard) -> runner.EngineInputs:
    """The layer inputs of an engine whose capture `heard` is."""

    def inputs(layer: runner.Layer) -> Any:
        before = N_LAYER - 1 if layer == "head" else int(layer) - 1
        return heard.own["token_embd" if before < 0 else f"blk.{before}.layer_out"].numpy()

    return inputs


def test_forced_with_its_own_inputs_both_streams_are_one() -> None:
    reference = Reference(RandomSource(LLAMA))
    chunks = [ids(7), ids(7, 1), ids(4, 2)]
    plain, both = Heard(18), Heard(18)
    reference.run(chunks, on_tap=plain)
    logits = logits_of(reference, chunks, engine_inputs=as_inputs(plain), on_tap=both)
    assert both.order == plain.order and set(both.local) == set(plain.own)
    for name, value in plain.own.items():
        assert torch.allclose(both.own[name], value, atol=1e-5), name
        assert torch.allclose(both.local[name], value, atol=1e-5), name
    assert torch.allclose(logits, plain.own["logits"], atol=1e-5)


@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_fault_shows_only_where_it_is_made(keep_logits: bool) -> None:
    """The engine's layer 1 is wrong: its input is fine, so the local value of layer 1 is right and differs from it;
    layer 2 starts from the wrong stream, and so does its local value."""
    reference = Reference(RandomSource(LLAMA))
    engine, both = Heard(7), Heard(7)
    reference.run([ids(7)], on_tap=engine)
    right = {name: value.clone() for name, value in engine.own.items()}
    engine.own["blk.1.layer_out"] = engine.own["blk.1.layer_out"] + 0.5
    reference.run([ids(7)], engine_inputs=as_inputs(engine), on_tap=both, keep_logits=keep_logits)
    for name, value in right.items():
        assert torch.allclose(both.own[name], value, atol=1e-5), name
        faulty = name.startswith("blk.2.")
        assert torch.allclose(both.local[name], value, atol=1e-5) is not faulty, name


def test_a_layer_without_engine_input_has_no_local_values() -> None:
    reference = Reference(RandomSource(LLAMA))
    plain, both = Heard(7), Heard(7)
    reference.run([ids(7)], on_tap=plain)
    inputs = as_inputs(plain)
    reference.run([ids(7)], engine_inputs=lambda il: None if il in (1, "head") else inputs(il), on_tap=both)
    assert {taps.split(name)[0] for name in both.local} == {None, 0, 2}
    assert "logits" not in both.local and "token_embd" in both.local
    assert torch.allclose(both.local["blk.2.layer_out"], plain.own["blk.2.layer_out"], atol=1e-5)


# -- precision, gradients ------------------------------------------------------------------------------


def test_float64_on_request() -> None:
    source = RandomSource(LLAMA)
    double = logits_of(Reference(source, dtype="float64"), [ids(9)])
    single = logits_of(Reference(source), [ids(9)])
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    error = float((double - single).abs().max())
    assert 0 < error < 1e-4


def test_a_models_forward_can_be_trained() -> None:
    source = RandomSource(LLAMA)
    reference = Reference(source)
    weights = SourceWeights(source)
    weights.keep = True
    gate = weights.get("blk.0.ffn_gate.weight").requires_grad_()
    state = State(torch.arange(5))
    x = reference.model.embed(weights, torch.from_numpy(ids(5))[None], state, lambda name, value: None)
    for il in range(N_LAYER):
        x = reference.model.layer(weights, il, x, state, lambda name, value: None)
    reference.model.head(weights, x, state, lambda name, value: None).square().mean().backward()
    assert gate.grad is not None and float(gate.grad.abs().max()) > 0


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[], [np.array([], dtype=np.int64)], [np.array([0, 40])], [np.array([-1, 3])]])
def test_bad_tokens(chunks: list[Any]) -> None:
    with pytest.raises(FixtureError, match="expected"):
        Reference(RandomSource(LLAMA)).run(chunks)


def test_unknown_architecture_names_the_known_ones() -> None:
    source = RandomSource(LLAMA)
    source.metadata["general.architecture"] = "no-such-arch"
    with pytest.raises(ArtifactFileError, match=r"'no-such-arch'.*llama, .*qwen3moe"):
        Reference(source)


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"],
)
def test_a_missing_key_is_named(key: str) -> None:
    source = RandomSource(LLAMA)
    del source.metadata[f"llama.{key}"]
    with pytest.raises(ArtifactFileError, match=f"llama.{key}"):
        Reference(source)


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(SettingsError, match="float16"):
        Reference(RandomSource(LLAMA), dtype="float16")
    with pytest.raises(SettingsError, match="abacus"):
        Reference(RandomSource(LLAMA), device="abacus")
