"""Faults planted in the artifact: each gets its verdict, with the tensors and keys that were touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.engine.runner import Engine
from diffharness.forensics.rounding import rounded
from diffharness.records import RunRecord
from diffharness.settings import configs_dir
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_write import encode_floats, rewrite_gguf
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.runs import NATIVE, whole_run
from tests.pipeline.embedded_variants import CHECKPOINT, HELDOUT, noise, trained, variant

Values = np.ndarray[Any, np.dtype[np.float32]]


def damaged(pair: Pair, out: Path, pattern: str, change: Callable[[Values], Values]) -> Pair:
    """A copy whose tensors of that pattern hold changed values; stored as F32, which llama.cpp loads as well."""
    with open_gguf(pair.gguf) as source:

        def tensor(info: Any, raw: Any) -> Any:
            if not fnmatchcase(info.name, pattern):
                return None
            values = change(source.read(info.name).copy()).astype(np.float32)
            return "F32", info.shape, encode_floats(values, "F32")

        rewrite_gguf(source, out, tensor=tensor)
    return replace(pair, gguf=out)


def rekeyed(pair: Pair, out: Path, **kv: Any) -> Pair:
    with open_gguf(pair.gguf) as source:
        rewrite_gguf(source, out, kv={key.replace("__", "."): value for key, value in kv.items()})
    return replace(pair, gguf=out)


def shuffle_rows(values: Values) -> Values:
    return np.random.default_rng(0).permutation(values)


def with_nan(values: Values) -> Values:
    values.reshape(-1)[32:64] = np.nan
    return values


# case, tensors, what is done to them, classes that must be named
WEIGHTS: list[tuple[str, str, Callable[[Values], Values], str]] = [
    ("llama", "blk.1.ffn_down.weight", shuffle_rows, "ffn_down.weight"),
    ("llama", "blk.2.attn_q.weight", lambda v: v * np.float32(1.3), "attn_q.weight"),
    ("qwen3", "blk.1.attn_q_norm.weight", lambda v: v - 1, "attn_q_norm.weight"),
    ("gemma3", "blk.*.attn_norm.weight", lambda v: v - 1, "attn_norm.weight"),
    ("gemma2", "blk.2.post_ffw_norm.weight", lambda v: v + 1, "post_ffw_norm.weight"),
    ("gemma4", "blk.*.layer_output_scale.weight", lambda v: np.ones_like(v), "layer_output_scale.weight"),
    ("gemma4", "token_embd.weight", lambda v: v * np.float32(0.8), "token_embd.weight"),
    ("mixtral", "blk.0.ffn_up_exps.weight", lambda v: v[::-1].copy(), "ffn_up_exps.weight"),
    ("qwen3moe", "blk.1.ffn_gate_inp.weight", shuffle_rows, "ffn_gate_inp.weight"),
]


@pytest.mark.parametrize(
    ("case", "pattern", "change", "klass"), WEIGHTS, ids=[f"{case}-{klass}" for case, _, _, klass in WEIGHTS]
)
def test_damaged_weights(
    make_pair: MakePair, tmp_path: Path, case: str, pattern: str, change: Callable[[Values], Values], klass: str
) -> None:
    pair = make_pair(case, "Q8_0")
    record = whole_run(damaged(pair, tmp_path / "damaged.gguf", pattern, change), with_checkpoint=True)
    assert record.verdict.all == ["artifact.weights"], (record.verdict, [f.message for f in record.findings])
    named = {row.name for row in record.legs.artifact.tensors if row.damaged}
    assert named and all(fnmatchcase(name, pattern) for name in named)
    assert {row.klass for row in record.legs.artifact.tensors if row.damaged} == {klass}
    assert record.legs.graph.status == "pass", "the engine computes the damaged file rightly"
    assert klass.removesuffix(".weight") in record.verdict.summary


def bytes_damaged(pair: Pair, out: Path, name: str, change: Callable[[Any], None]) -> Pair:
    """A copy with some bytes of one tensor changed, in the type that it has."""
    with open_gguf(pair.gguf) as source:

        def tensor(info: Any, raw: Any) -> Any:
            if info.name != name:
                return None
            data = np.array(raw).reshape(-1).view(np.uint8).copy()
            change(data)
            return info.type, info.shape, data

        rewrite_gguf(source, out, tensor=tensor)
    return replace(pair, gguf=out)


def one_block(data: Any) -> None:
    data[144 * 3 + 4 : 144 * 4] = np.random.default_rng(0).integers(0, 256, 140)  # its scales stay what they are


def one_value(data: Any) -> None:
    data[1001] ^= 1  # a BF16's exponent: twice or half of what it was


@pytest.mark.parametrize(("type_name", "change"), [("Q4_K", one_block), ("BF16", one_value)])
def test_one_block_or_value_is_enough(make_pair: MakePair, tmp_path: Path, type_name: str, change: Any) -> None:
    pair = bytes_damaged(make_pair("llama", type_name), tmp_path / "damaged.gguf", "blk.1.ffn_down.weight", change)
    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.all == ["artifact.weights"], (record.verdict, [f.message for f in record.findings])
    assert [row.name for row in record.legs.artifact.tensors if row.damaged] == ["blk.1.ffn_down.weight"]


def test_values_rounded_to_bf16_on_the_way_are_the_checkpoints(make_pair: MakePair, tmp_path: Path) -> None:
    """A float32 checkpoint saved in 16 bits before it was converted: said, and no damage."""
    pair = damaged(make_pair("llama", "F32"), tmp_path / "rounded.gguf", "*", lambda v: rounded(v, "BF16"))
    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.primary == "agree", (record.verdict, [f.message for f in record.findings])
    assert any("rounded to 16 bits" in finding.message for finding in record.findings)


def test_types_that_need_importance_have_a_control(make_pair: MakePair, tmp_path: Path) -> None:
    source, out = make_pair("llama", "Q8_0"), tmp_path / "low.gguf"
    with open_gguf(source.gguf) as q8:
        matrices = [info.name for info in q8.tensors.values() if info.name.startswith("blk.") and len(info.shape) > 1]
        types = dict.fromkeys(matrices, "IQ3_XXS")
        uniform = {name: q8.tensors[name].shape[-1] for name in types}
    Engine(NATIVE).quantize_like(source.gguf, out, types, uniform)
    record = whole_run(replace(source, gguf=out), with_checkpoint=True)
    assert record.verdict.primary == "agree", (record.verdict, [f.message for f in record.findings])
    assert all(row.control is not None for row in record.legs.artifact.tensors)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda: lambda name, values: None, "agree"),
        (lambda: trained(5, 4e-4), "artifact.lineage"),
        (lambda: noise(0.1), "artifact.weights"),
    ],
    ids=["clean", "trained", "noise"],
)
def test_another_model_is_told_from_noise(tmp_path: Path, change: Callable[[], Any], verdict: str) -> None:
    """The embedded model with every matrix moved a little: by training it is another model, by noise damaged."""
    out = variant(tmp_path / "other.gguf", change())
    record = whole_run(Pair(out, CHECKPOINT, HELDOUT), with_checkpoint=True, n_tokens=512)
    assert record.verdict.all == [verdict], (record.verdict, [f.message for f in record.findings])
    ppl = record.scores.reference
    assert ppl["artifact"].ppl < 1.5 * ppl["checkpoint"].ppl


def test_too_few_positions_tell_nothing(tmp_path: Path) -> None:
    """Tensors that differ all over on a text of 64 tokens: damage or another model, that cannot be said."""
    out = variant(tmp_path / "noisy.gguf", noise(0.1))
    record = whole_run(Pair(out, CHECKPOINT, HELDOUT), with_checkpoint=True, n_tokens=64)
    assert record.verdict.all == ["inconclusive"], record.verdict
    assert record.verdict.next_step is not None and "--tokens" in record.verdict.next_step


def test_damage_in_one_layer_names_that_layer(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("llama", "Q4_K")
    record = whole_run(
        damaged(pair, tmp_path / "damaged.gguf", "blk.1.*.weight", lambda v: v * np.float32(1.25)), with_checkpoint=True
    )
    assert record.verdict.primary == "artifact.weights"
    assert {row.layer for row in record.legs.artifact.tensors if row.damaged} == {1}
    first = record.first_divergence
    assert first is not None and first.leg == "artifact" and first.layer == 1


def test_nan_block_is_the_files_fault(make_pair: MakePair, tmp_path: Path) -> None:
    pair = damaged(make_pair("qwen2", "Q8_0"), tmp_path / "nan.gguf", "blk.1.ffn_up.weight", with_nan)
    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.primary == "artifact.file", record.verdict
    assert "blk.1.ffn_up.weight" in record.verdict.summary
    assert "engine.graph" not in record.verdict.all


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("llama", "llama.rope.freq_base", 20000.0),
        ("qwen3", "qwen3.attention.layer_norm_rms_epsilon", 0.5),
        ("gemma2", "gemma2.final_logit_softcapping", 30.0),
        ("gemma3", "gemma3.attention.sliding_window", 32),
        ("gemma4", "gemma4.rope.freq_base_swa", 1e6),
        ("qwen3moe", "qwen3moe.expert_used_count", 1),
    ],
)
def test_wrong_metadata_key(make_pair: MakePair, tmp_path: Path, case: str, key: str, value: float) -> None:
    pair = rekeyed(make_pair(case, "Q8_0"), tmp_path / "rekeyed.gguf", **{key.replace(".", "__"): value})
    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.all == ["artifact.metadata"], (record.verdict, [f.message for f in record.findings])
    assert [row.key for row in record.legs.artifact.metadata if row.used] == [key]
    assert key in record.verdict.summary
    assert record.legs.artifact.metadata[0].repaired_ppl is not None


def test_truncated_file_is_unreadable(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("llama", "Q8_0")
    whole = pair.gguf.read_bytes()
    short = tmp_path / "short.gguf"
    for length in (2, 20, 700, len(whole) // 2, len(whole) - 1):
        short.write_bytes(whole[:length])
        record = whole_run(replace(pair, gguf=short))
        assert record.verdict.primary == "artifact.file", length
        assert record.subject.artifact.arch is None


def test_period_of_issue_6056(make_pair: MakePair, tmp_path: Path) -> None:
    """Layer scalars replaced and two thirds of the layers' matrices perturbed."""
    pair = make_pair("gemma4", "Q8_0")
    noise = np.random.default_rng(1)

    def perturb(values: Values) -> Values:
        return values + noise.normal(0, 0.7 * values.std(), values.shape).astype(np.float32)

    first = damaged(
        pair, tmp_path / "a.gguf", "blk.[2345].*_*[nkvqtp].weight", lambda v: perturb(v) if v.ndim > 1 else v
    )
    both = damaged(first, tmp_path / "b.gguf", "blk.*.layer_output_scale.weight", np.ones_like)
    record: RunRecord = whole_run(both, with_checkpoint=True)
    assert record.verdict.primary == "artifact.weights"
    damaged_layers = {
        r.layer for r in record.legs.artifact.tensors if r.damaged and r.klass.startswith(("attn", "ffn"))
    }
    assert damaged_layers == {2, 3, 4, 5}
    assert record.scores.reference["artifact"].ppl > record.scores.reference["control"].ppl


def test_reader_is_not_fooled_by_a_copy(make_pair: MakePair, tmp_path: Path) -> None:
    """The helper itself changes nothing else: a copy with no change at all is clean."""
    pair = make_pair("gemma4", "Q8_0")
    copy = damaged(pair, tmp_path / "copy.gguf", "nothing", lambda v: v)
    with open_gguf(pair.gguf) as a, open_gguf(copy.gguf) as b:
        assert isinstance(a, GgufFile) and all((a.raw(name) == b.raw(name)).all() for name in a.tensors)
    assert whole_run(copy, with_checkpoint=True).verdict.primary == "agree"


def _dithered(values: Values, amplitude: float, random: np.random.Generator) -> Values:
    """Values moved by up to `amplitude` of a four-bit step, so that many are rounded to the second nearest level."""
    if values.ndim < 2:
        return values
    blocks = values.reshape(-1, 32)
    step = (blocks.max(axis=1) - blocks.min(axis=1)) / 15
    return (blocks + random.uniform(-amplitude, amplitude, blocks.shape) * step[:, None]).reshape(values.shape)


@pytest.mark.parametrize(("which", "verdict"), [("*", "agree"), ("blk.4.ffn_*.weight", "artifact.weights")])
def test_rounding_that_was_learned_is_no_damage(tmp_path: Path, which: str, verdict: str) -> None:
    """Codes that are not the nearest, in every matrix: by design, if the logits are as near as plain rounding leaves
    them. In a few matrices only, no quantizer did it."""
    fixtures = configs_dir().parent / "fixtures" / "tiny-gemma4"
    plain, out, random = tmp_path / "plain.gguf", tmp_path / "learned.gguf", np.random.default_rng(0)
    checkpoint_to_gguf(Checkpoint(fixtures / "checkpoint"), plain)
    pair = Pair(plain, fixtures / "checkpoint", fixtures / "heldout.json")
    with open_gguf(plain) as source:
        values = {name: _dithered(source.read(name), 0.35, random) for name in source.tensors}

        def tensor(info: Any, raw: Any) -> Any:
            return (
                ("F32", info.shape, encode_floats(values[info.name], "F32")) if fnmatchcase(info.name, which) else None
            )

        rewrite_gguf(source, tmp_path / "moved.gguf", tensor=tensor)
    with open_gguf(fixtures / "tiny-gemma4-Q4_K_M.gguf") as clean:
        types = {name: "Q4_K" for name, info in clean.tensors.items() if len(info.shape) > 1}
    Engine(NATIVE).quantize_like(tmp_path / "moved.gguf", out, types)
    record = whole_run(replace(pair, gguf=out), with_checkpoint=True, n_tokens=256)
    assert record.verdict.all == [verdict], (record.verdict, [f.message for f in record.findings])
    if verdict == "agree":
        assert any("learns its rounding" in finding.message for finding in record.findings)
        assert not any(row.damaged for row in record.legs.artifact.tensors)
    else:
        assert {row.name for row in record.legs.artifact.tensors if row.damaged} == {
            f"blk.4.ffn_{part}.weight" for part in ("gate", "up", "down")
        }
