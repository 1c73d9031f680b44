"""Faults planted on the engine's side by --override-kv: each is `engine.graph` at the right first tap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from tests.e2e.conftest import MakePair
from tests.e2e.runs import whole_run

# case, override, first tap, first token that can show it (None: any)
FAULTS = [
    ("llama", "llama.rope.freq_base=float:9000", "blk.0.attn_q_rope", 1),
    ("llama", "llama.attention.layer_norm_rms_epsilon=float:0.01", "blk.0.attn_norm", 0),
    ("mixtral", "llama.expert_used_count=int:1", "blk.0.moe_experts", 0),
    ("qwen2", "qwen2.rope.freq_base=float:500000", "blk.0.attn_q_rope", 1),
    ("qwen3", "qwen3.attention.layer_norm_rms_epsilon=float:0.002", "blk.0.attn_norm", 0),
    ("qwen3moe", "qwen3moe.expert_used_count=int:2", "blk.0.moe_experts", 0),
    ("gemma2", "gemma2.attn_logit_softcapping=float:30", "blk.0.attn_ctx", 1),
    ("gemma2", "gemma2.final_logit_softcapping=float:8", "logits", 0),
    ("gemma2", "gemma2.attention.sliding_window=int:8", "blk.0.attn_ctx", 8),
    ("gemma3", "gemma3.attention.sliding_window=int:12", "blk.0.attn_ctx", 12),
    ("gemma3", "gemma3.rope.freq_base=float:10000", "blk.5.attn_q_rope", 1),
    ("gemma3", "gemma3.rope.scaling.factor=float:1", "blk.5.attn_q_rope", 1),
    ("gemma4", "gemma4.final_logit_softcapping=float:30", "logits", 0),
    ("gemma4", "gemma4.attention.sliding_window=int:4", "blk.0.attn_ctx", 4),
    ("gemma4", "gemma4.attention.sliding_window=int:17", "blk.0.attn_ctx", 16),
    ("gemma3", "gemma3.attention.sliding_window=int:15", "blk.0.attn_ctx", 15),
    ("gemma4", "gemma4.rope.freq_base_swa=float:20000", "blk.0.attn_q_rope", 1),
    ("gemma4", "gemma4.rope.freq_base=float:10000", "blk.2.attn_q_rope", 1),
    ("gemma4-experts", "gemma4.expert_used_count=int:1", "blk.0.moe_experts", 0),
]


@pytest.mark.parametrize(
    ("case", "override", "tap", "token"), FAULTS, ids=[f"{c}-{o.split('=')[0]}" for c, o, _, _ in FAULTS]
)
def test_override_is_named(make_pair: MakePair, case: str, override: str, tap: str, token: int) -> None:
    record = whole_run(make_pair(case), overrides=(override,))
    assert record.verdict.primary == "engine.graph", (record.verdict, [f.message for f in record.findings])
    assert record.legs.graph.status == "fail"
    assert [pair.a for pair in record.legs.settings.pairs] == ["native, callback off", "strict, callback off"]
    assert record.legs.settings.status == "pass", "what was captured is what the engine computes without the callback"
    first = record.first_divergence
    assert first is not None and first.tap == tap
    assert first.token == token
    assert first.nmse_local is not None and first.nmse_local > 1e-7
    assert record.subject.engine is not None and record.subject.engine.overrides == [override]


def test_a_cap_that_is_a_little_wrong_on_small_logits(make_pair: MakePair, tmp_path: Path) -> None:
    """Logits of a few units under a cap of 30: with 31 they differ by an NMSE of 1e-8."""
    pair = make_pair("gemma4")
    gguf = tmp_path / "cap30.gguf"
    with open_gguf(pair.gguf) as source:
        rewrite_gguf(source, gguf, kv={"gemma4.final_logit_softcapping": 30.0})
    record = whole_run(replace(pair, gguf=gguf), overrides=("gemma4.final_logit_softcapping=float:31",))
    assert record.verdict.primary == "engine.graph", record.verdict
    assert record.first_divergence is not None and record.first_divergence.tap == "logits"


def test_only_the_touched_kind_of_layer_is_named(make_pair: MakePair) -> None:
    record = whole_run(make_pair("gemma4"), overrides=("gemma4.attention.sliding_window=int:4",))
    graph = record.legs.graph
    assert {row.kind for row in graph.per_layer if not row.ok} == {"sliding"}
    assert {row.kind for row in graph.per_layer if row.ok} == {"global"}
    assert graph.affected is not None and "sliding" in graph.affected
