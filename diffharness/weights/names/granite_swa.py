"""`granite_swa`: Granite Swash, dense (`granite_swa`) or with experts (`granitemoe_swa`).

Granite's tensors and a sink per head. Gate and up of the experts stay one tensor in GGUF, those of the shared MLP too.
Which layers turn their queries and keys config.json says by `layer_rope_theta`, 0 for those that do not; the engine's
converter asks for `no_rope_layers` and does not see it. GGUF has one rope base for all layers.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, MLP_BIAS, attention_rules, fused_or_not, mlp_rules
from diffharness.weights.names._config import need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import Keys, embedding_rules, matrix, rope_freqs_rule, vector
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.names.granite import dense_example, scaled_metadata
from diffharness.weights.source import Metadata

_ARCH = "granite_swa"
_PERIOD = 4  # the first layer of each is global


def metadata(config: Config) -> dict[str, Any]:
    n_layer = need_int(config, "num_hidden_layers")
    out = scaled_metadata(config, _ARCH)
    out |= _rope(config, n_layer, out[f"{_ARCH}.rope.freq_base"])
    kinds = config.get("layer_types")
    slides = [kind == SLIDING for kind in kinds] if kinds else [il % _PERIOD != 0 for il in range(n_layer)]
    out[f"{_ARCH}.attention.sliding_window"] = need_int({"sliding_window": 128, **config}, "sliding_window")
    out[f"{_ARCH}.attention.sliding_window_pattern"] = slides
    if config.get("num_local_experts"):
        out[f"{_ARCH}.expert_count"] = need_int(config, "num_local_experts")
        out[f"{_ARCH}.expert_used_count"] = need_int(config, "num_experts_per_tok")
    if config.get("shared_intermediate_size"):
        out[f"{_ARCH}.expert_shared_feed_forward_length"] = need_int(config, "shared_intermediate_size")
    return out


def _rope(config: Config, n_layer: int, base: float) -> dict[str, Any]:
    """The base of the layers that turn, and which those are."""
    bases = config.get("layer_rope_theta") or [base] * n_layer
    bases = [float(theta) for theta in bases]
    found = {theta for theta in bases if theta}
    if len(bases) != n_layer or len(found) > 1:
        raise CheckpointError(f"config.json: `layer_rope_theta`: expected {n_layer} times 0 or one base, found {bases}")
    return {
        f"{_ARCH}.rope.freq_base": found.pop() if found else base,
        f"{_ARCH}.attention.rope_pattern": [theta != 0 for theta in bases],
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_rot = keys.integer("rope.dimension_count", keys.head_dim)
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, n_rot)]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_rules(metadata, il, permuted=True, bias=metadata.get(ATTENTION_BIAS)),
            TensorRule(blk + "attn_sinks.weight", (keys.n_head,), (hf + "self_attn.sinks",), draw=normal(1.5)),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
        ]
        if keys.n_expert:
            out += _expert_rules(metadata, blk, hf)
        else:
            out += mlp_rules(metadata, il, bias=metadata.get(MLP_BIAS))
    return out


def _expert_rules(metadata: Metadata, blk: str, hf: str) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, n_expert = keys.n_embd, keys.integer("feed_forward_length"), keys.n_expert
    n_ff_shared = keys.integer("expert_shared_feed_forward_length", 0)
    moe, shared = hf + "block_sparse_moe.", hf + "shared_mlp."

    def tensor(name: str, shape: tuple[int, ...], first: str, other: str) -> TensorRule:
        return TensorRule(blk + name, shape, (moe + first,), aliases=(((moe + other,), PLAIN),))

    both = tensor(
        "ffn_gate_up_exps.weight", (n_expert, 2 * n_ff, n_embd), "experts.gate_up_proj", "input_linear.weight"
    )
    apart = [TensorRule(f"{blk}ffn_{part}_exps.weight", (n_expert, n_ff, n_embd)) for part in ("gate", "up")]
    out = [
        tensor("ffn_gate_inp.weight", (n_expert, n_embd), "router.weight", "router.layer.weight"),
        *fused_or_not(metadata, [both], apart),
        tensor("ffn_down_exps.weight", (n_expert, n_embd, n_ff), "experts.down_proj", "output_linear.weight"),
    ]
    if n_ff_shared:
        out += matrix(blk, "ffn_up_shexp", shared + "input_linear", 2 * n_ff_shared, n_embd)
        out += matrix(blk, "ffn_down_shexp", shared + "output_linear", n_embd, n_ff_shared)
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    """Windows, and a layer of each kind without position."""
    unturned = {0: 0.0, 3: 0.0}
    return dense_example(sizes) | {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        "sliding_window": sizes.window,
        "layer_types": [SLIDING if il % 2 else GLOBAL for il in range(sizes.n_layer)],
        "layer_rope_theta": [unturned.get(il, 5e3) for il in range(sizes.n_layer)],
    }


MAP = ArchMap(
    arch=_ARCH,
    model_types=("granite_swa", "granitemoe_swa"),
    architectures=("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM"),
    metadata=metadata,
    rules=rules,
    example=example,
)
