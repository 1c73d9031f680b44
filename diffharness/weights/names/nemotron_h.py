"""`nemotron_h`, `nemotron_h_moe`: Nemotron H and Nemotron 3. One block a layer, of four kinds.

config.json spells the kinds of layers as a list of words or as one string of letters, of which `*` is attention.
Tensors of `mtp.` predict further tokens and are not part of the model proper. The same model has the one or the other
architecture in GGUF by whether it has experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, MLP_BIAS, bias_metadata
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, head_rules, matrix
from diffharness.weights.names._mamba import expect_unlimited
from diffharness.weights.names._mamba import head_rules as mixer_rules
from diffharness.weights.names._map import PLAIN, STACK, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import n_main_layers
from diffharness.weights.source import Metadata

DENSE, SPARSE = "nemotron_h", "nemotron_h_moe"
_WORDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_OLDER = {"linear_attention": "mamba", "full_attention": "attention"}
_CHOICE_BIAS = normal(0.3)


# -- keys -------------------------------------------------------------------------------------------------


def metadata(config: Config) -> dict[str, Any]:
    kinds = _kinds(config)
    arch = SPARSE if "moe" in kinds else DENSE
    _expect_known(config, kinds)
    eps = need_float(config, "layer_norm_epsilon", "rms_norm_eps")
    size = config.get("head_dim") or config.get("attention_head_dim") or 128
    whole = {**config, "num_hidden_layers": len(kinds), "rms_norm_eps": eps, "head_dim": size}
    out = decoder_metadata({"intermediate_size": 0, **whole}, arch)
    wide = need_int(config, "moe_intermediate_size") if arch == SPARSE else need_int(config, "intermediate_size")
    n_kv = out[f"{arch}.attention.head_count_kv"]
    n_head = need_int(config, "mamba_num_heads")
    out |= {
        f"{arch}.feed_forward_length": [wide if kind in ("mlp", "moe") else 0 for kind in kinds],
        f"{arch}.attention.head_count_kv": [n_kv if kind == "attention" else 0 for kind in kinds],
        f"{arch}.attention.layer_norm_epsilon": eps,
        f"{arch}.ssm.conv_kernel": config.get("conv_kernel") or 4,
        f"{arch}.ssm.inner_size": n_head * (config.get("mamba_head_dim") or 64),
        f"{arch}.ssm.state_size": config.get("ssm_state_size") or 128,
        f"{arch}.ssm.time_step_rank": n_head,
        f"{arch}.ssm.group_count": config.get("n_groups") or 8,
        **bias_metadata(config),
    }
    if arch == SPARSE:
        out |= {
            f"{arch}.expert_count": need_int(config, "n_routed_experts"),
            f"{arch}.expert_used_count": need_int(config, "num_experts_per_tok"),
            f"{arch}.expert_feed_forward_length": wide,
            f"{arch}.expert_shared_feed_forward_length": need_int(config, "moe_shared_expert_intermediate_size"),
            f"{arch}.expert_shared_count": config.get("n_shared_experts") or 1,
            f"{arch}.expert_weights_norm": bool(config.get("norm_topk_prob", True)),
            f"{arch}.expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
            f"{arch}.expert_group_count": config.get("n_group") or 1,
        }
        if (config.get("topk_group") or 1) != 1 or (config.get("n_group") or 1) != 1:
            out[f"{arch}.expert_group_used_count"] = config.get("topk_group") or 1
        if config.get("moe_latent_size"):
            out[f"{arch}.moe_latent_size"] = need_int(config, "moe_latent_size")
    return out


def _kinds(config: Config) -> list[str]:
    """Each layer's kind in the words of published configs."""
    pattern = config.get("layers_block_type") or config.get("layer_types") or config.get("hybrid_override_pattern")
    spelled = [str(word) for word in pattern] if isinstance(pattern, (str, list)) else []
    kinds = [_OLDER.get(word, _WORDS.get(word, word)) for word in spelled]
    if not kinds or not set(kinds) <= set(_WORDS.values()):
        raise CheckpointError(
            f"config.json: `layers_block_type`: expected {', '.join(_WORDS.values())}, found {pattern}"
        )
    return kinds


def _expect_known(config: Config, kinds: list[str]) -> None:
    """CheckpointError for what neither GGUF nor the reference has a form of."""
    if config.get("mlp_hidden_act", "relu2") != "relu2" or config.get("mamba_hidden_act", "silu") != "silu":
        raise CheckpointError("config.json: expected relu2 in feed-forwards and silu in mixers")
    if config.get("use_bias") or config.get("mamba_proj_bias") or not config.get("use_conv_bias", True):
        raise CheckpointError("config.json: expected a bias in the mixers' convolution and none in their projections")
    if "moe" in kinds and "mlp" in kinds:
        raise CheckpointError("config.json: expected experts in every feed-forward or in none, found both")
    if config.get("sliding_window"):
        raise CheckpointError("config.json: expected attention to all earlier tokens, found `sliding_window`")
    expect_unlimited(config)


# -- tensors ----------------------------------------------------------------------------------------------


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd = keys.n_embd
    out = [
        _rule("token_embd.weight", (keys.n_vocab, n_embd), "backbone.embeddings.weight"),
        _rule("output_norm.weight", (n_embd,), "backbone.norm_f.weight"),
        *head_rules(metadata),
    ]
    feeds = keys.by_layer("feed_forward_length")
    n_kv = keys.by_layer("attention.head_count_kv")
    n_model = n_main_layers(keys)
    for il in range(n_model):
        blk, hf = f"blk.{il}.", f"backbone.layers.{il}."
        out.append(_rule(blk + "attn_norm.weight", (n_embd,), hf + "norm.weight"))
        if feeds[il]:
            block = _feed_forward(metadata, il, blk, hf + "mixer.")
        elif n_kv[il]:
            block = _attention(metadata, il, blk, hf + "mixer.")
        else:
            block = mixer_rules(keys, blk, hf + "mixer.")
        out += [_also(one) for one in block]
    for il in range(n_model, keys.n_layer):
        out += _further(metadata, il)
    return out


def _attention(metadata: Metadata, il: int, blk: str, hf: str) -> list[TensorRule]:
    keys = Keys(metadata)
    bias = bool(metadata.get(ATTENTION_BIAS)) or None
    n_head = keys.by_layer("attention.head_count")[il]
    n_embd, q, kv = keys.n_embd, n_head * keys.head_dim, keys.by_layer("attention.head_count_kv")[il] * keys.head_dim
    return [
        *matrix(blk, "attn_q", hf + "q_proj", q, n_embd, bias=bias),
        *matrix(blk, "attn_k", hf + "k_proj", kv, n_embd, bias=bias),
        *matrix(blk, "attn_v", hf + "v_proj", kv, n_embd, bias=bias),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, q, bias=bias),
    ]


def _feed_forward(metadata: Metadata, il: int, blk: str, hf: str) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, n_expert = keys.n_embd, keys.by_layer("feed_forward_length")[il], keys.n_expert
    if not n_expert:
        bias = bool(metadata.get(MLP_BIAS)) or None
        up, down = (hf + "up_proj", hf + "down_proj")
        return [
            *matrix(blk, "ffn_up", up, n_ff, n_embd, bias=bias),
            *matrix(blk, "ffn_down", down, n_embd, n_ff, bias=bias),
        ]
    latent = keys.integer("moe_latent_size", 0)
    narrow, n_shared = latent or n_embd, keys.integer("expert_shared_feed_forward_length")
    n_wide = keys.by_layer("expert_feed_forward_length", n_ff)[il] or n_ff
    out = [
        TensorRule(blk + "ffn_gate_inp.weight", (n_expert, n_embd), (hf + "gate.weight",)),
        TensorRule(
            blk + "exp_probs_b.bias",
            (n_expert,),
            (hf + "gate.e_score_correction_bias",),
            aliases=(((hf + "gate.e_score_correction.bias",), PLAIN),),
            draw=_CHOICE_BIAS,
        ),
        _stack(blk, hf, "up", (n_expert, n_wide, narrow)),
        _stack(blk, hf, "down", (n_expert, narrow, n_wide)),
        *matrix(blk, "ffn_up_shexp", hf + "shared_experts.up_proj", n_shared, n_embd),
        *matrix(blk, "ffn_down_shexp", hf + "shared_experts.down_proj", n_embd, n_shared),
    ]
    if latent:
        out += [
            *matrix(blk, "ffn_latent_down", hf + "fc1_latent_proj", latent, n_embd),
            *matrix(blk, "ffn_latent_up", hf + "fc2_latent_proj", n_embd, latent),
        ]
    return out


def _stack(blk: str, hf: str, part: str, shape: tuple[int, ...]) -> TensorRule:
    parts = tuple(f"{hf}experts.{i}.{part}_proj.weight" for i in range(shape[0]))
    fused = (((f"{hf}experts.{part}_proj",), PLAIN),)
    return TensorRule(f"{blk}ffn_{part}_exps.weight", shape, parts, STACK, aliases=fused)


def _further(metadata: Metadata, il: int) -> list[TensorRule]:
    """A block that predicts a further token: attention and experts in one; never run here."""
    keys, blk = Keys(metadata), f"blk.{il}."
    n_embd = keys.n_embd
    own = {"enorm": (n_embd,), "hnorm": (n_embd,), "eh_proj": (n_embd, 2 * n_embd), "shared_head_norm": (n_embd,)}
    shapes = {f"nextn.{name}": shape for name, shape in own.items()}
    shapes |= {"attn_norm": (n_embd,), "post_attention_norm": (n_embd,)}
    found = [TensorRule(f"{blk}{name}.weight", shape) for name, shape in shapes.items()]
    found += [*_attention(metadata, il, blk, ""), *_feed_forward(metadata, il, blk, "")]
    return [replace(rule, hf=(), aliases=(), required=False, synthetic=False) for rule in found]


def _rule(name: str, shape: tuple[int, ...], hf: str) -> TensorRule:
    return _also(TensorRule(name, shape, (hf,)))


def _also(rule: TensorRule) -> TensorRule:
    """The rule with the spelling that transformers has in memory, and some checkpoints on disk."""
    spellings = [(rule.hf, rule.layout), *rule.aliases]
    others = [(tuple(part.replace("backbone.", "model.", 1) for part in parts), layout) for parts, layout in spellings]
    return replace(rule, aliases=(*rule.aliases, *others))


# -- synthetic models -------------------------------------------------------------------------------------


def example(arch: str, sizes: Sizes) -> dict[str, Any]:
    feed = "moe" if arch == SPARSE else "mlp"
    period = ("mamba", feed, "attention", feed)
    kinds = [*period, *period][1 : sizes.n_layer + 2]  # every kind, and a feed-forward first
    return decoder_example(
        sizes,
        "nemotron_h",
        "NemotronHForCausalLM",
        num_hidden_layers=len(kinds),
        layers_block_type=[{"mamba": "linear_attention", "attention": "full_attention"}.get(k, k) for k in kinds],
        hidden_act=None,
        rms_norm_eps=None,
        rope_theta=None,
        mlp_hidden_act="relu2",
        mamba_hidden_act="silu",
        layer_norm_epsilon=1e-3,
        ssm_state_size=16,
        mamba_num_heads=6,
        mamba_head_dim=sizes.n_embd // 4,
        n_groups=2,
        conv_kernel=4,
        pad_token_id=0,
        **(_experts_example(sizes) if arch == SPARSE else {}),
    )


def _experts_example(sizes: Sizes) -> dict[str, Any]:
    return {
        "n_routed_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": sizes.n_ff_expert,
        "moe_shared_expert_intermediate_size": sizes.n_ff,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_latent_size": sizes.n_embd // 2,
        "n_group": 1,
        "topk_group": 1,
    }


def _map(arch: str) -> ArchMap:
    return ArchMap(
        arch=arch,
        model_types=("nemotron_h",),
        architectures=("NemotronHForCausalLM",),
        metadata=metadata,
        rules=rules,
        example=partial(example, arch),
        ignored=("mtp.",),
        covers=lambda config: ("moe" in _kinds(config)) == (arch == SPARSE),
    )


MAPS = (_map(DENSE), _map(SPARSE))
