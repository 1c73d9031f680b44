"""`gemma3n`: Gemma 3n, text: E2B and E4B.

The engine's graph has in it, without a key that it reads: four streams, per-layer embeddings of 256, a Laurel rank of
64, 20 layers with keys and values of their own, ten sparse layers, a cap of 30. The keys are written nevertheless, as
the engine's converter does, and a rank by a key of our own.

Layers that borrow keys and values need none: checkpoints may carry them, the engine's loader wants them, nothing reads
them. Where a checkpoint lacks them they are zeros; so are the per-layer embeddings of the tokens of images and audio,
which a published checkpoint has not got.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_int
from diffharness.weights.names._draw import around, by_width, normal
from diffharness.weights.names._gemma import (
    PREFIXES,
    gemma_example,
    hf_rule,
    layer_types,
    stored_float,
    text_part,
)
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_metadata, head_rules
from diffharness.weights.names._map import PLAIN, STACK, ArchMap, Config, PaddedRows, Sizes, TensorRule
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.source import Float32Array, Metadata

_ARCH = "gemma3n"
_PERIOD = 5
_N_SPARSE, _SPARSITY = 10, 0.95
_RANK = 64
_QUIET = around(0.3)  # what a branch of a random model adds: as deep as these are, more would make noise of every error
LAUREL_RANK = "diffharness.laurel_rank"
PER_LAYER_VOCAB = "diffharness.vocab_size_per_layer_input"  # rows of the per-layer embedding, where fewer than tokens
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 15,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "laurel_rank": _RANK,
    "final_logit_softcapping": 30.0,
}


def metadata(config: Config) -> dict[str, Any]:
    config = text_part(config, **DEFAULTS)
    if not config.get("altup_correct_scale", True):
        raise CheckpointError("config.json: expected `altup_correct_scale` true, found false: GGUF has no key for it")
    kinds, widths = layer_types(config, _PERIOD), config["intermediate_size"]
    n_layer = len(kinds)
    n_ff = widths if isinstance(widths, list) else [widths] * n_layer
    full, local = _bases(config)
    plain = {**config, "intermediate_size": n_ff[0], "rope_parameters": {"rope_type": "default", "rope_theta": full}}
    out = decoder_metadata(plain, _ARCH) | {
        f"{_ARCH}.feed_forward_length": n_ff,
        f"{_ARCH}.rope.freq_base_swa": local,
        f"{_ARCH}.attention.sliding_window": need_int(config, "sliding_window"),
        f"{_ARCH}.attention.sliding_window_pattern": [kind == SLIDING for kind in kinds],
        f"{_ARCH}.attention.shared_kv_layers": need_int(config, "num_kv_shared_layers"),
        f"{_ARCH}.final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),
        f"{_ARCH}.altup.active_idx": need_int(config, "altup_active_idx"),
        f"{_ARCH}.altup.num_inputs": need_int(config, "altup_num_inputs"),
        f"{_ARCH}.embedding_length_per_layer_input": need_int(config, "hidden_size_per_layer_input"),
        f"{_ARCH}.activation_sparsity_scale": [_deviations(share) for share in _sparsity(config, n_layer)],
    }
    if config["laurel_rank"] != _RANK:
        out[LAUREL_RANK] = need_int(config, "laurel_rank")
    if need_int(config, "vocab_size_per_layer_input") < need_int(config, "vocab_size"):
        out[PER_LAYER_VOCAB] = need_int(config, "vocab_size_per_layer_input")
    return out


def _bases(config: Config) -> tuple[float, float]:
    """Rope bases of global and of sliding layers."""
    rope = config.get("rope_parameters") or {}
    full, sliding = rope.get(GLOBAL) or {}, rope.get(SLIDING) or {}
    for kind in (full, sliding, config.get("rope_scaling") or {}):
        if kind.get("rope_type", "default") != "default":
            raise CheckpointError(f"config.json: expected rope without scaling, found {kind['rope_type']!r}")
    theta = full.get("rope_theta") or config.get("rope_theta") or 1e6
    return float(theta), float(sliding.get("rope_theta") or config.get("rope_local_base_freq") or 1e4)


def _sparsity(config: Config, n_layer: int) -> list[float]:
    """The share of closed gates, by layer."""
    given = config.get("activation_sparsity_pattern")
    if given is None:
        n_sparse = _N_SPARSE if n_layer > _N_SPARSE else 0
        return [_SPARSITY] * n_sparse + [0.0] * (n_layer - n_sparse)
    values = list(given) if isinstance(given, list) else [given] * n_layer
    if len(values) != n_layer or not all(0.0 <= float(value) < 1.0 for value in values):
        raise CheckpointError(f"config.json: `activation_sparsity_pattern`: expected {n_layer} shares below 1")
    return [float(value) for value in values]


def _deviations(share: float) -> float:
    """How many standard deviations above the mean a normal value exceeds with 1 - share; minus infinity for 0."""
    return float(np.float32(NormalDist().inv_cdf(float(np.float32(share))))) if share else -math.inf


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    slides = [bool(slide) for slide in keys.by_layer("attention.sliding_window_pattern")]
    scales = keys.get("activation_sparsity_scale")
    shares = [round(NormalDist().cdf(float(scale)), 6) if math.isfinite(scale) else 0.0 for scale in scales or ()]
    return {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": keys.n_embd,
        "intermediate_size": keys.by_layer("feed_forward_length"),
        "num_hidden_layers": keys.n_layer,
        "num_attention_heads": keys.n_head,
        "num_key_value_heads": keys.n_head_kv,
        "head_dim": keys.head_dim,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": stored_float(keys["attention.layer_norm_rms_epsilon"]),
        "vocab_size": keys.n_vocab,
        "vocab_size_per_layer_input": int(metadata.get(PER_LAYER_VOCAB, keys.n_vocab)),
        "hidden_size_per_layer_input": keys["embedding_length_per_layer_input"],
        "num_kv_shared_layers": keys.get("attention.shared_kv_layers", max(0, keys.n_layer - 20)),
        "altup_num_inputs": keys.get("altup.num_inputs", 4),
        "altup_active_idx": keys.get("altup.active_idx", 0),
        "altup_correct_scale": True,
        "laurel_rank": int(metadata.get(LAUREL_RANK, _RANK)),
        "activation_sparsity_pattern": shares or None,
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": [SLIDING if slide else GLOBAL for slide in slides],
        "final_logit_softcapping": stored_float(keys.get("final_logit_softcapping", 30.0)) or None,
        "rope_parameters": {
            GLOBAL: {"rope_type": "default", "rope_theta": stored_float(keys.get("rope.freq_base", 1e6))},
            SLIDING: {"rope_type": "default", "rope_theta": stored_float(keys.get("rope.freq_base_swa", 1e4))},
        },
        "tie_word_embeddings": bool(metadata.get(TIED_HEAD, True)),
        "dtype": "float32",
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    d, n_layer, ple = keys.n_embd, keys.n_layer, keys.integer("embedding_length_per_layer_input", 256)
    rows = int(metadata.get(PER_LAYER_VOCAB, keys.n_vocab))
    n_other = keys.integer("altup.num_inputs", 4) - 1
    out = [
        hf_rule("token_embd.weight", (keys.n_vocab, d), "embed_tokens.weight", draw=by_width(1.0)),
        hf_rule("output_norm.weight", (d,), "norm.weight"),
        *head_rules(metadata),
        hf_rule(
            "per_layer_token_embd.weight",
            (keys.n_vocab, n_layer * ple),
            "embed_tokens_per_layer.weight",
            layout=PLAIN if rows >= keys.n_vocab else PaddedRows(rows, keys.n_vocab),
            draw=normal(ple**-0.5),
        ),
        hf_rule("per_layer_model_proj.weight", (n_layer * ple, d), "per_layer_model_projection.weight"),
        hf_rule("per_layer_proj_norm.weight", (ple,), "per_layer_projection_norm.weight"),
        _stack("altup_proj", n_other, d, "altup_projections"),
        _stack("altup_unembd_proj", n_other, d, "altup_unembed_projections"),
    ]
    for il in range(n_layer):
        out += [*_attention_rules(keys, il), *_layer_rules(keys, il, int(metadata.get(LAUREL_RANK, _RANK)))]
    return out


def _stack(name: str, n: int, d: int, hf: str) -> TensorRule:
    """One matrix for every stream but the first."""
    first, *others = (tuple(f"{prefix}{hf}.{i}.weight" for i in range(n)) for prefix in PREFIXES)
    return TensorRule(name + ".weight", (n, d, d), first, STACK, aliases=tuple((names, STACK) for names in others))


def _attention_rules(keys: Keys, il: int) -> list[TensorRule]:
    blk, hf, d, size = f"blk.{il}.", f"layers.{il}.self_attn.", keys.n_embd, keys.head_dim
    q, kv = keys.n_head * size, keys.n_head_kv * size
    scores = around(size**-0.25)  # the norms of queries and keys are the only scale that scores have
    own = il < keys.n_layer - keys.integer("attention.shared_kv_layers", max(0, keys.n_layer - 20))
    shapes = {"attn_k": (kv, d), "attn_v": (kv, d), "attn_k_norm": (size,)}
    names = {"attn_k": "k_proj", "attn_v": "v_proj", "attn_k_norm": "k_norm"}
    draws = {"attn_k_norm": scores}
    return [
        hf_rule(blk + "attn_norm.weight", (d,), f"layers.{il}.input_layernorm.weight"),
        hf_rule(blk + "attn_q.weight", (q, d), hf + "q_proj.weight"),
        hf_rule(blk + "attn_q_norm.weight", (size,), hf + "q_norm.weight", draw=scores),
        *(
            _unless_borrowed(
                hf_rule(f"{blk}{name}.weight", shape, f"{hf}{names[name]}.weight", draw=draws.get(name)), own
            )
            for name, shape in shapes.items()
        ),
        hf_rule(blk + "attn_output.weight", (d, q), hf + "o_proj.weight"),
        hf_rule(blk + "post_attention_norm.weight", (d,), f"layers.{il}.post_attention_layernorm.weight", draw=_QUIET),
    ]


def _unless_borrowed(rule: TensorRule, own: bool) -> TensorRule:
    """The rule; for a layer that borrows keys and values, of a tensor that may be missing and then is zero."""

    def zeros() -> Float32Array:
        return np.zeros(rule.shape, dtype=np.float32)

    if own:
        return rule
    return TensorRule(rule.name, rule.shape, rule.hf, rule.layout, True, rule.aliases, values=zeros, synthetic=False)


def _layer_rules(keys: Keys, il: int, rank: int) -> list[TensorRule]:
    """Feed-forward, Laurel, AltUp and the layer's own embedding."""
    blk, hf, d = f"blk.{il}.", f"layers.{il}.", keys.n_embd
    n_ff, n, ple = keys.by_layer("feed_forward_length")[il], keys.integer("altup.num_inputs", 4), 256
    ple = keys.integer("embedding_length_per_layer_input", ple)
    altup, laurel = hf + "altup.", hf + "laurel."
    return [
        hf_rule(blk + "ffn_norm.weight", (d,), hf + "pre_feedforward_layernorm.weight"),
        hf_rule(blk + "ffn_gate.weight", (n_ff, d), hf + "mlp.gate_proj.weight"),
        hf_rule(blk + "ffn_up.weight", (n_ff, d), hf + "mlp.up_proj.weight"),
        hf_rule(blk + "ffn_down.weight", (d, n_ff), hf + "mlp.down_proj.weight"),
        hf_rule(blk + "post_ffw_norm.weight", (d,), hf + "post_feedforward_layernorm.weight", draw=_QUIET),
        hf_rule(blk + "inp_gate.weight", (ple, d), hf + "per_layer_input_gate.weight"),
        hf_rule(blk + "proj.weight", (d, ple), hf + "per_layer_projection.weight"),
        hf_rule(blk + "post_norm.weight", (d,), hf + "post_per_layer_input_norm.weight", draw=_QUIET),
        hf_rule(blk + "altup_correct_coef.weight", (n, n), altup + "correction_coefs.weight", draw=by_width(0.4)),
        hf_rule(blk + "altup_correct_scale.weight", (d,), altup + "correct_output_scale"),
        hf_rule(blk + "altup_predict_coef.weight", (n * n, n), altup + "prediction_coefs.weight", draw=by_width(0.2)),
        # The router's input is divided by the width; larger weights make it say something.
        hf_rule(blk + "altup_router.weight", (n, d), altup + "modality_router.weight", draw=normal(d**0.5)),
        hf_rule(blk + "altup_router_norm.weight", (d,), altup + "router_norm.weight"),
        hf_rule(blk + "laurel_l.weight", (rank, d), laurel + "linear_left.weight"),
        hf_rule(blk + "laurel_r.weight", (d, rank), laurel + "linear_right.weight"),
        hf_rule(blk + "laurel_post_norm.weight", (d,), laurel + "post_laurel_norm.weight", draw=_QUIET),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    """Five periods, of which the engine's graph takes the last to borrow its keys and values."""
    n_layer = 25
    return gemma_example(
        sizes,
        "gemma3n_text",
        "Gemma3nForCausalLM",
        num_hidden_layers=n_layer,
        intermediate_size=[sizes.n_ff] * n_layer,
        rope_theta=None,
        rope_parameters={
            GLOBAL: {"rope_type": "default", "rope_theta": 5e3},
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        },
        sliding_window=sizes.window,
        layer_types=[GLOBAL if il % _PERIOD == _PERIOD - 1 else SLIDING for il in range(n_layer)],
        vocab_size_per_layer_input=sizes.n_vocab,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=n_layer - 20,
        altup_num_inputs=4,
        altup_active_idx=0,
        altup_correct_scale=True,
        laurel_rank=_RANK,
        activation_sparsity_pattern=[_SPARSITY] * _N_SPARSE + [0.0] * (n_layer - _N_SPARSE),
        final_logit_softcapping=30.0,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("gemma3n_text", "gemma3n"),
    architectures=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=(
        "lm_head.",  # the embedding again, where a tied checkpoint has it
        "model.vision_tower.",
        "model.audio_tower.",
        "model.embed_vision.",
        "model.embed_audio.",
    ),
)
