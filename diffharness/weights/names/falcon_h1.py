"""`falcon-h1`: Falcon H1. GGUF's matrices are the checkpoint's times the multipliers that config.json states.

The multipliers are `diffharness.falcon_h1.*` in the metadata of a checkpoint; a GGUF has no keys for them.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, MLP_BIAS, bias_metadata
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_example, decoder_metadata, matrix, vector
from diffharness.weights.names._mamba import NORM_FIRST, expect_unlimited, head_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._reorder import Scaled
from diffharness.weights.source import Metadata

_ARCH = "falcon-h1"
_OURS = "diffharness.falcon_h1."
_SCALARS = (
    "embedding_multiplier",
    "lm_head_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)
_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    expect_unlimited(config)
    expand = config.get("mamba_expand") or 2
    inner = config.get("mamba_d_ssm") or expand * need_int(config, "hidden_size")
    n_head = need_int(config, "mamba_n_heads")
    if not n_head or inner % n_head:
        raise CheckpointError(f"config.json: `mamba_n_heads`: expected a divisor of {inner}, found {n_head}")
    out = decoder_metadata(config, _ARCH) | {
        f"{_ARCH}.ssm.conv_kernel": config.get("mamba_d_conv") or 4,
        f"{_ARCH}.ssm.inner_size": inner,
        f"{_ARCH}.ssm.state_size": config.get("mamba_d_state") or 256,
        f"{_ARCH}.ssm.time_step_rank": n_head,
        f"{_ARCH}.ssm.group_count": config.get("mamba_n_groups") or 1,
    }
    out |= bias_metadata(config)
    if not config.get("mamba_conv_bias", True):
        raise CheckpointError("config.json: `mamba_conv_bias` false: the engine has no form of such a model")
    if config.get("mamba_rms_norm", False):
        out[_OURS + "norm"] = True
        if config.get("mamba_norm_before_gate", True):
            out[NORM_FIRST] = True
    scales: dict[str, Any] = {name: float(config.get(name) or 1.0) for name in _SCALARS}
    for name, n in _LISTS.items():
        scales[name] = [float(value) for value in config.get(name) or [1.0] * n]
        if len(scales[name]) != n:
            raise CheckpointError(f"config.json: `{name}`: expected {n} numbers, found {len(scales[name])}")
    if out[TIED_HEAD] and scales["embedding_multiplier"] != scales["lm_head_multiplier"]:
        raise CheckpointError("config.json: a tied head with a multiplier of its own has no GGUF form")
    return out | {_OURS + name: value for name, value in scales.items()}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    of_checkpoint = TIED_HEAD in metadata
    n_embd, size, n_ff, n_vocab = keys.n_embd, keys.head_dim, keys.integer("feed_forward_length"), keys.n_vocab
    q, kv = keys.n_head * size, keys.n_head_kv * size
    biased, mlp_biased = bool(metadata.get(ATTENTION_BIAS)), bool(metadata.get(MLP_BIAS)) or None

    def by(*names: str) -> Scaled:
        return Scaled(tuple(float(metadata.get(_OURS + name, 1.0)) for name in names))

    gate, down = metadata.get(_OURS + "mlp_multipliers", [1.0, 1.0])
    attended = by("attention_in_multiplier")
    keyed = by("key_multiplier", "attention_in_multiplier")
    out = [
        TensorRule("token_embd.weight", (n_vocab, n_embd), ("model.embed_tokens.weight",), by("embedding_multiplier")),
        TensorRule("output_norm.weight", (n_embd,), ("model.final_layernorm.weight",)),
        TensorRule("rope_freqs.weight", (keys.integer("rope.dimension_count", size) // 2,), required=False),
    ]
    if not metadata.get(TIED_HEAD):
        head = by("lm_head_multiplier")
        out.append(TensorRule("output.weight", (n_vocab, n_embd), ("lm_head.weight",), head, required=of_checkpoint))
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        attn, ffn = hf + "self_attn.", hf + "feed_forward."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *matrix(blk, "attn_q", attn + "q_proj", q, n_embd, layout=attended),
            *matrix(blk, "attn_k", attn + "k_proj", kv, n_embd, layout=keyed),
            *matrix(blk, "attn_v", attn + "v_proj", kv, n_embd, layout=attended),
            # Multipliers of a projection's input are not its bias's.
            TensorRule(blk + "attn_q.bias", (q,), (attn + "q_proj.bias",), required=biased),
            TensorRule(blk + "attn_k.bias", (kv,), (attn + "k_proj.bias",), by("key_multiplier"), required=biased),
            TensorRule(blk + "attn_v.bias", (kv,), (attn + "v_proj.bias",), required=biased),
            *matrix(
                blk,
                "attn_output",
                attn + "o_proj",
                n_embd,
                q,
                layout=by("attention_out_multiplier"),
                bias=biased or None,
            ),
            *_mixer_rules(metadata, blk, hf + "mamba."),
            TensorRule(blk + "ffn_norm", (n_embd,), (hf + "pre_ff_layernorm.weight",)),
            *matrix(blk, "ffn_gate", ffn + "gate_proj", n_ff, n_embd, layout=Scaled((gate,)), bias=mlp_biased),
            *matrix(blk, "ffn_up", ffn + "up_proj", n_ff, n_embd, bias=mlp_biased),
            *matrix(blk, "ffn_down", ffn + "down_proj", n_embd, n_ff, layout=Scaled((down,)), bias=mlp_biased),
        ]
    return out


def _mixer_rules(metadata: Metadata, blk: str, hf: str) -> list[TensorRule]:
    keys = Keys(metadata)
    inner, shared = keys.integer("ssm.inner_size"), keys.integer("ssm.group_count") * keys.integer("ssm.state_size")
    rows = (inner, inner, shared, shared, keys.integer("ssm.time_step_rank"))  # gate, x, b, c, dt
    factors = metadata.get(_OURS + "ssm_multipliers", [1.0] * len(rows))
    scales = {
        blk + "ssm_in.weight": Scaled(
            (float(metadata.get(_OURS + "ssm_in_multiplier", 1.0)),), tuple(zip(rows, factors, strict=True))
        ),
        blk + "ssm_out.weight": Scaled((float(metadata.get(_OURS + "ssm_out_multiplier", 1.0)),)),
    }
    norm = bool(metadata.get(_OURS + "norm")) if TIED_HEAD in metadata else None
    return head_rules(keys, blk, hf, norm=norm, conv_bias=TIED_HEAD in metadata or None, scales=scales)


def example(sizes: Sizes) -> dict[str, Any]:
    mixer: dict[str, Any] = {
        "mamba_d_ssm": 96 * (sizes.n_embd // 64),  # not the width times a whole number
        "mamba_n_heads": 6,
        "mamba_d_head": 16 * (sizes.n_embd // 64),
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "pad_token_id": 0,
    }
    multipliers: dict[str, Any] = {  # powers of two: a checkpoint's values and a file's are the same then
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.5,
        "attention_in_multiplier": 2.0,
        "attention_out_multiplier": 0.5,
        "ssm_in_multiplier": 0.5,
        "ssm_out_multiplier": 2.0,
        "mlp_multipliers": [0.5, 2.0],
        "ssm_multipliers": [2.0, 1.0, 4.0, 0.5, 0.25],
    }
    return decoder_example(sizes, "falcon_h1", "FalconH1ForCausalLM", **mixer, **multipliers)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("falcon_h1",),
    architectures=("FalconH1ForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
