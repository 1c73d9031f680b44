"""The reference's simulation of ggml's rounding: products, the cache, and that nothing of it exists unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffharness.reference import moe, ops
from diffharness.reference.model import DEFINITION, Arithmetic, KvCache
from diffharness.reference.rounding import RoundingMatrix, RoundingWeights, _labelled
from diffharness.reference.runner import Reference
from diffharness.reference.weights import SourceWeights
from diffharness.replay.activation_quant import minima, rounded
from diffharness.weights.dequant import TYPE_IDS, dequantize
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import TensorInfo
from tests.reference.random_source import LLAMA, QWEN3MOE, RandomSource

RNG = np.random.default_rng(5)
HELD = {"Q4_0": "Q8_0", "Q8_0": "Q8_0", "Q4_K": "Q8_K", "Q6_K": "Q8_K", "F16": "F16", "BF16": "BF16"}


class Typed(RandomSource):
    """A random model that says of its matrices that they are of some type."""

    def __init__(self, metadata, type_name: str) -> None:
        super().__init__(metadata)
        self.type_name = type_name

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        plain = super().tensors.values()
        return {
            info.name: TensorInfo(info.name, info.shape, self.type_name if len(info.shape) > 1 else "F32", info.n_bytes)
            for info in plain
        }


def wide(metadata):
    """Widths of whole blocks of 256."""
    sizes = {"embedding_length": 256, "feed_forward_length": 256, "expert_feed_forward_length": 256}
    sizes |= {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    return {key: sizes.get(key.split(".", 1)[1], value) for key, value in metadata.items()}


@pytest.mark.parametrize("type_name", HELD)
def test_products_with_a_matrix_round_the_other_side(type_name: str) -> None:
    weights = RoundingWeights(Typed(wide(LLAMA), type_name))
    w = weights.get("blk.0.attn_q.weight")
    plain = torch.from_numpy(weights.source.read("blk.0.attn_q.weight"))
    x = torch.from_numpy(RNG.standard_normal((2, 3, 256)).astype(np.float32))
    seen = rounded(x, HELD[type_name])
    assert not torch.equal(seen, x)
    assert torch.equal(ops.linear(x, w), F.linear(seen, plain))
    assert torch.equal(ops.linear(x, w, plain[:, 0]), F.linear(seen, plain, plain[:, 0]))
    out = torch.empty(3, len(plain))
    torch.mm(x[0], w.T, out=out)
    assert torch.equal(out, torch.mm(seen[0], plain.T))
    assert type(ops.linear(x, w)) is torch.Tensor and type(w + 1) is torch.Tensor  # only parts of it round on


def test_an_expert_of_a_stack_rounds_too() -> None:
    weights = RoundingWeights(Typed(wide(QWEN3MOE), "Q8_0"))
    name = "blk.1.ffn_up_exps.weight"
    x = torch.from_numpy(RNG.standard_normal((4, 256)).astype(np.float32))
    found = ops.linear(x, moe.matrix(weights, name, 2))
    assert torch.equal(found, F.linear(rounded(x, "Q8_0"), torch.from_numpy(weights.source.read(name)[2])))


def test_stacks_and_parts_round_with_minima_too() -> None:
    """A Q4_1 matrix has columns for its minima, which products need and nothing else sees."""
    n_out, n_in = 6, 64
    blocks = RNG.integers(0, 256, (n_out, n_in // 32, 20), dtype=np.uint8)
    blocks[:, :, :4] = np.frombuffer(np.float16([0.5, -0.25]).tobytes(), dtype=np.uint8)
    flat = torch.from_numpy(np.array(dequantize(blocks.reshape(-1), "Q4_1", (n_out, n_in))))
    low = torch.from_numpy(np.array(minima(blocks.reshape(n_out, -1), "Q4_1")))
    w = _labelled(torch.cat([flat, low.to(flat)], dim=-1), "Q8_1", minima=True)
    x = torch.from_numpy(RNG.standard_normal((3, n_in)).astype(np.float32))
    whole = ops.linear(x, w)
    assert (whole - x @ flat.T).abs().max() < 0.1 * whole.abs().max() and not torch.equal(whole, x @ flat.T)
    assert w.shape == flat.shape and torch.equal(w * 1, flat) and type(w * 1) is torch.Tensor
    stack = w.unflatten(0, (2, 3))
    by_part = torch.matmul(x.expand(2, -1, -1), stack.mT)
    assert torch.allclose(by_part, whole.unflatten(1, (2, 3)).movedim(1, 0), rtol=1e-5, atol=1e-5)
    again = ops.linear(x, w.reshape(2, 3, -1)[1])
    assert torch.allclose(again, whole[:, 3:], rtol=1e-5, atol=1e-5)
    assert torch.equal(w.reshape(-1, 32), flat.reshape(-1, 32)) and type(w.reshape(-1, 32)) is torch.Tensor
    rows = torch.cat([ops.linear(x, part) for part in stack], dim=-1)
    assert torch.allclose(rows, whole, rtol=1e-5, atol=1e-5)


def test_norms_embeddings_and_float32_matrices_are_plain() -> None:
    weights = RoundingWeights(Typed(wide(LLAMA), "Q8_0"))
    assert type(weights.get("blk.0.attn_norm.weight")) is torch.Tensor
    assert type(ops.embed(weights, torch.tensor([[1, 2, 1]]))) is torch.Tensor
    assert isinstance(weights.rows("token_embd.weight", slice(0, 4)), RoundingMatrix)  # the tied head
    assert type(RoundingWeights(RandomSource(LLAMA)).get("blk.0.attn_q.weight")) is torch.Tensor


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_1"])
def test_minima_are_multiplied_by_the_stored_sums(type_name: str, tmp_path: Path) -> None:
    """By the format: d_w d_x sum(q_w q_x) + m_w s_x of each block, s_x the float16 of d_x times the sum of codes."""
    blocks = RNG.integers(0, 256, (6 * 4, {"Q4_1": 20, "Q5_1": 24}[type_name]), dtype=np.uint8)
    scales = (RNG.standard_normal((24, 2)) * 0.1).astype(np.float16)
    blocks[:, :4] = scales.view(np.uint8)
    path = tmp_path / "m.gguf"
    _write_one(path, type_name, blocks, (6, 128))
    x = (RNG.standard_normal((5, 128)) + 3).astype(np.float32)
    with open_gguf(path) as source:
        weights = RoundingWeights(source)
        ours = ops.linear(torch.from_numpy(x), weights.get("w.weight")).numpy()
        some = ops.linear(torch.from_numpy(x), weights.rows("w.weight", slice(2, 4))).numpy()
    w = dequantize(blocks.reshape(-1), type_name, (6, 128)).reshape(6, 4, 32).astype(np.float64)
    minima = scales[:, 1].reshape(6, 4).astype(np.float64)
    per_block = x.reshape(5, 4, 32)
    d = np.abs(per_block).max(axis=-1) / np.float32(127)
    codes = np.rint(per_block * (np.float32(127) / np.abs(per_block).max(axis=-1, keepdims=True))).astype(np.float64)
    sums = (d * codes.sum(axis=-1).astype(np.float32)).astype(np.float16).astype(np.float64)
    held = d.astype(np.float16).astype(np.float64)
    expected = np.einsum("obi,tbi,tb->to", w - minima[..., None], codes, held) + np.einsum("ob,tb->to", minima, sums)
    plain = np.einsum("obi,tbi,tb->to", w, codes, held)
    assert _nmse(ours, expected) < 1e-12 < 1e-10 < _nmse(plain, expected)
    np.testing.assert_allclose(some, ours[:, 2:4], rtol=1e-5)


def test_the_cache_rounds_keys_and_values_and_without_flash_the_rest() -> None:
    q, k, v = (torch.from_numpy(RNG.standard_normal((1, 70, 2, 8)).astype(np.float32)) for _ in range(3))

    def attend(cache: KvCache | None, *qkv: torch.Tensor) -> torch.Tensor:
        return ops.attention(*qkv, scale=0.3, arithmetic=Arithmetic(kv_cache=cache))

    half = [rounded(t, "F16") for t in (q, k, v)]
    assert torch.equal(attend(KvCache("F16", "F16"), q, k, v), attend(None, q, half[1], half[2]))
    bf16 = [rounded(t, "BF16") for t in (q, k, v)]
    assert torch.equal(attend(KvCache("BF16", "BF16"), q, k, v), attend(None, *bf16))  # not tile by tile
    assert torch.equal(attend(KvCache("F16", "F32"), q, k, v), attend(None, half[0], half[1], v))
    plain = attend(KvCache("F16", "F32", flash=False), q, k, v)
    assert torch.equal(plain, attend(None, half[0], half[1], v))
    weights = attend(KvCache("F16", "F16", flash=False), q, k, v)
    assert 1e-9 < _nmse(weights.numpy(), attend(None, *half).numpy()) < 1e-6  # those of the softmax


def test_nothing_is_rounded_unless_asked_for() -> None:
    reference = Reference(RandomSource(LLAMA))
    assert type(reference.weights) is SourceWeights
    assert not DEFINITION.conventions and DEFINITION.kv_cache is None
    ids = [np.arange(30, dtype=np.int64)]
    plain, asked = (Reference(RandomSource(LLAMA), arithmetic=a).run(ids) for a in (DEFINITION, Arithmetic()))
    assert plain is not None and asked is not None and torch.equal(plain, asked)
    both = Arithmetic(rounded_activations=True, kv_cache=KvCache("F32", "F32"))
    same = Reference(RandomSource(LLAMA), arithmetic=both).run(ids)  # of F32 weights there is nothing to round
    assert same is not None and torch.equal(plain, same)
    assert both.conventions == ("rounded_activations", "kv_cache")


@pytest.mark.parametrize("metadata", [LLAMA, QWEN3MOE], ids=["llama", "qwen3moe"])
def test_values_written_back_are_what_the_forward_goes_on_from(metadata) -> None:
    """Every tap of the second stream is the forward's own memory, in every step and in the head."""
    source, ids = RandomSource(metadata), [np.arange(20, dtype=np.int64) % 40]
    told: dict[str, np.ndarray] = {}
    engine = RandomSource(metadata, seed=3)
    Reference(engine).run(ids, on_tap=lambda tap, own, _, rows: told.setdefault(tap, own.numpy().copy()))

    def inputs(layer):
        last = metadata[f"{source.arch}.block_count"] - 1
        name = f"blk.{last if layer == 'head' else layer - 1}.layer_out"
        return told["token_embd" if layer == 0 else name]

    errors: dict[str, float] = {}

    def on_tap(tap, own, local, rows) -> None:
        if local is not None:
            errors[tap] = _nmse(local.numpy(), told[tap])
            local.copy_(torch.from_numpy(told[tap][rows]))

    Reference(source).run(ids, engine_inputs=inputs, on_tap=on_tap)
    assert set(told) - {"token_embd"} <= set(errors)
    for tap in ("blk.1.attn_q_rope", "blk.1.attn_ctx", "blk.2.ffn_in", "blk.2.layer_out"):
        assert errors[tap] < 1e-12, (tap, errors[tap])  # no weight stands between these and the tap before
    assert errors["blk.1.attn_q"] > 0.1  # other weights


def _nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).sum() / (b**2).sum())


def _write_one(path: Path, type_name: str, blocks: np.ndarray, shape: tuple[int, int]) -> None:
    """A GGUF of one tensor, `w.weight`."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType(TYPE_IDS[type_name])
    writer.add_tensor("w.weight", blocks.reshape(shape[0], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
