"""Hyperparameters and tensors that most decoders share, between config.json and GGUF keys.

config.json is read in both of its forms: the old one (`rope_theta`, `rope_scaling` with `type` or `rope_type`) and
transformers 5's (`rope_parameters`, possibly one per layer type). Keys under `diffharness.` are ours: what a
checkpoint says that GGUF has no key for; the engine ignores them, and an artifact from elsewhere lacks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffharness.errors import ArtifactFileError, CheckpointError
from diffharness.weights.names._map import PLAIN, Config, Layout, TensorRule
from diffharness.weights.source import Float32Array, Metadata

_LARGEST = (1 << 31) - 1
_MOST_LAYERS = 4096
_MOST_EXPERTS = 65536

TIED_HEAD = "diffharness.tied_head"  # bool: the output head is the embedding
LLAMA3_ROPE = "diffharness.rope.llama3"  # [factor, low_freq_factor, high_freq_factor, original context]

# -- config.json --------------------------------------------------------------------------------------


def need(config: Config, *keys: str) -> Any:
    """The value of the first of `keys` that is there and not null; CheckpointError if none is."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise CheckpointError(f"config.json lacks `{keys[0]}`")


def need_int(config: Config, *keys: str) -> int:
    value = need(config, *keys)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"config.json: `{keys[0]}`: expected a whole number, found {value!r}")
    return value


def need_float(config: Config, *keys: str) -> float:
    value = need(config, *keys)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"config.json: `{keys[0]}`: expected a number, found {value!r}")
    return float(value)


def expect_activation(config: Config, *names: str) -> None:
    """CheckpointError unless the feed-forward's activation is one of `names` (or not stated)."""
    found = config.get("hidden_activation") or config.get("hidden_act") or names[0]
    if found not in names:
        raise CheckpointError(f"config.json: expected activation {' or '.join(names)}, found {found!r}")


def rope_parameters(config: Config, *, default_theta: float, layer_type: str | None = None) -> dict[str, Any]:
    """The rope of one kind of layer in transformers 5's words: `rope_type`, `rope_theta` and what the type needs."""
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layer_type is not None and isinstance(rope.get(layer_type), Mapping):
        rope = dict(rope[layer_type])
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or default_theta)
    if rope.get("original_max_position_embeddings") is None:
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        rope["original_max_position_embeddings"] = original
    return rope


def rope_metadata(arch: str, rope: Config) -> dict[str, Any]:
    """GGUF keys of what `rope_parameters` gave: default, linear, yarn or llama3; CheckpointError for others."""
    key = f"{arch}.rope."
    out: dict[str, Any] = {key + "freq_base": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind == "linear":
        out |= {key + "scaling.type": "linear", key + "scaling.factor": need_float(rope, "factor")}
    elif kind == "yarn":
        out |= {
            key + "scaling.type": "yarn",
            key + "scaling.factor": need_float(rope, "factor"),
            key + "scaling.original_context_length": need_int(rope, "original_max_position_embeddings"),
        }
        if (attention_factor := _yarn_attention_factor(rope)) is not None:
            out[key + "scaling.yarn_attn_factor"] = attention_factor
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name):
                out[f"{key}scaling.yarn_{name}"] = need_float(rope, name)
        if rope.get("truncate") is False:
            raise CheckpointError("config.json: yarn without truncation is not supported: GGUF has no key for it")
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        out[LLAMA3_ROPE] = [need_float(rope, name) for name in names]
    elif kind != "default":
        raise CheckpointError(
            f"config.json: expected rope type default, linear, yarn or llama3, found {kind!r}",
        )
    return out


def _yarn_attention_factor(rope: Config) -> float | None:
    """The factor on sine and cosine where the model states one; None for the default, 0.1 ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return need_float(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        log = math.log(need_float(rope, "factor"))
        return (0.1 * need_float(rope, "mscale") * log + 1.0) / (0.1 * need_float(rope, "mscale_all_dim") * log + 1.0)
    return None


def rope_config(metadata: Metadata, arch: str, default_theta: float = 10000.0) -> dict[str, Any]:
    """config.json's rope keys in their old form, which every version of transformers reads."""
    key = f"{arch}.rope."
    out: dict[str, Any] = {"rope_theta": metadata.get(key + "freq_base", default_theta)}
    kind = metadata.get(key + "scaling.type", "none")
    if LLAMA3_ROPE in metadata:
        factor, low, high, original = metadata[LLAMA3_ROPE]
        out["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original),
        }
    elif kind in ("linear", "yarn") and key + "scaling.factor" in metadata:
        scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata[key + "scaling.factor"]}
        for gguf, hf in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if f"{key}scaling.{gguf}" in metadata:
                scaling[hf] = metadata[f"{key}scaling.{gguf}"]
        out["rope_scaling"] = scaling
    return out


# -- a whole decoder ------------------------------------------------------------------------------------


def decoder_metadata(
    config: Config, arch: str, *, default_theta: float = 10000.0, head_dim: int | None = None
) -> dict[str, Any]:
    """The keys that every decoder has, in the words and the order of the engine's converter.

    `head_dim` is the architecture's own default where config.json may leave it out; None means width / heads, which
    GGUF need not state. Rope keys are those of the only, or the global, kind of layer.
    """
    n_head = need_int(config, "num_attention_heads")
    size = config.get("head_dim") or head_dim
    out: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        f"{arch}.block_count": need_int(config, "num_hidden_layers"),
        f"{arch}.context_length": need_int(config, "max_position_embeddings"),
        f"{arch}.embedding_length": need_int(config, "hidden_size"),
        f"{arch}.feed_forward_length": need_int(config, "intermediate_size"),
        f"{arch}.attention.head_count": n_head,
        f"{arch}.attention.head_count_kv": config.get("num_key_value_heads") or n_head,
        **rope_metadata(arch, rope_parameters(config, default_theta=default_theta, layer_type="full_attention")),
        f"{arch}.attention.layer_norm_rms_epsilon": need_float(config, "rms_norm_eps"),
        f"{arch}.vocab_size": need_int(config, "vocab_size"),
        TIED_HEAD: bool(config.get("tie_word_embeddings", False)),
    }
    if size is not None:
        out |= {f"{arch}.attention.key_length": int(size), f"{arch}.attention.value_length": int(size)}
    return out


def decoder_config(metadata: Metadata, arch: str) -> dict[str, Any]:
    """The config.json keys that every decoder has."""
    get = Keys(metadata)
    out: dict[str, Any] = {
        "hidden_size": get.n_embd,
        "intermediate_size": get["feed_forward_length"],
        "num_hidden_layers": get.n_layer,
        "num_attention_heads": get.n_head,
        "num_key_value_heads": get.n_head_kv,
        "head_dim": get.head_dim,
        "max_position_embeddings": get["context_length"],
        "rms_norm_eps": get["attention.layer_norm_rms_epsilon"],
        "vocab_size": get.n_vocab,
        "tie_word_embeddings": bool(metadata.get(TIED_HEAD, False)),
        "dtype": "float32",
        **rope_config(metadata, arch),
    }
    for name in ("bos", "eos"):
        out[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return out


@dataclass(frozen=True)
class Keys:
    """Look-ups in GGUF metadata for writing rules: a missing key is an ArtifactFileError that names it."""

    metadata: Metadata

    def __getitem__(self, name: str) -> Any:
        key = f"{self.metadata['general.architecture']}.{name}"
        if self.metadata.get(key) is None:
            raise ArtifactFileError(f"required metadata key `{key}` is missing")
        return self.metadata[key]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.metadata['general.architecture']}.{name}")
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of reasonable size: rules list tensors by the thousand, not by the billion."""
        value = self[name] if default is None else self.get(name, default)
        return self._whole(name, value)

    def by_layer(self, name: str, default: int | None = None) -> list[int]:
        """One whole number (or truth value) per layer, also where the metadata state one for all."""
        value = self[name] if default is None else self.get(name, default)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * self.n_layer
        if len(values) < self.n_layer:
            raise ArtifactFileError(f"metadata key `{name}`: expected {self.n_layer} values, found {len(values)}")
        return [self._whole(name, value) for value in values]

    def _whole(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value <= _LARGEST:
            found = repr(value)[:40]
            raise ArtifactFileError(f"metadata key `{name}`: expected a whole number up to {_LARGEST}, found {found}")
        return int(value)

    @property
    def n_layer(self) -> int:
        n_layer = self.integer("block_count")
        if n_layer > _MOST_LAYERS:
            raise ArtifactFileError(f"metadata key `block_count`: expected at most {_MOST_LAYERS}, found {n_layer}")
        return n_layer

    @property
    def n_expert(self) -> int:
        n_expert = self.integer("expert_count", 0)
        if n_expert > _MOST_EXPERTS:
            raise ArtifactFileError(f"metadata key `expert_count`: expected at most {_MOST_EXPERTS}, found {n_expert}")
        return n_expert

    @property
    def n_embd(self) -> int:
        return self.integer("embedding_length")

    @property
    def n_head(self) -> int:
        return self.integer("attention.head_count")

    @property
    def n_head_kv(self) -> int:
        return self.integer("attention.head_count_kv", self.n_head)

    @property
    def head_dim(self) -> int:
        """`attention.key_length`, or width / heads (of the first layer, where layers differ)."""
        if self.get("attention.key_length") is not None:
            return self.integer("attention.key_length")
        return self.n_embd // max(1, self.by_layer("attention.head_count")[0] if self.n_layer else 1)

    @property
    def n_vocab(self) -> int:
        """`vocab_size`, or the length of the tokenizer's list where the file has only that."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if self.get("vocab_size") is None and isinstance(tokens, (list, tuple)):
            return len(tokens)
        return self.integer("vocab_size")


# -- tensors --------------------------------------------------------------------------------------------


def embedding_rules(metadata: Metadata, prefix: str = "model.") -> list[TensorRule]:
    """Embedding, final norm (stored plainly) and, unless the head is tied, the head."""
    keys = Keys(metadata)
    rules = [
        TensorRule("token_embd.weight", (keys.n_vocab, keys.n_embd), (prefix + "embed_tokens.weight",)),
        TensorRule("output_norm.weight", (keys.n_embd,), (prefix + "norm.weight",)),
    ]
    return rules + head_rules(metadata)


def head_rules(metadata: Metadata) -> list[TensorRule]:
    """The head: none if it is known to be tied, required if it is known not to be, else it may be there."""
    keys = Keys(metadata)
    tied = metadata.get(TIED_HEAD)
    if tied:
        return []
    return [
        TensorRule("output.weight", (keys.n_vocab, keys.n_embd), ("lm_head.weight",), required=tied is not None),
    ]


def rope_freqs_rule(metadata: Metadata, n_rot: int) -> TensorRule:
    """Llama 3's frequency divisors: computed where the metadata come from a checkpoint, else they may be there."""
    if LLAMA3_ROPE not in metadata:
        return TensorRule("rope_freqs.weight", (n_rot // 2,), required=False)
    base = float(Keys(metadata)["rope.freq_base"])
    factor, low, high, original = (float(value) for value in metadata[LLAMA3_ROPE])
    return TensorRule(
        "rope_freqs.weight",
        (n_rot // 2,),
        values=lambda: llama3_divisors(n_rot, base, factor=factor, low=low, high=high, original=original),
    )


def llama3_divisors(
    n_rot: int, base: float, *, factor: float, low: float, high: float, original: float
) -> Float32Array:
    """By what each rotary pair's frequency is divided, [n_rot / 2] (Llama 3.1's scaling).

    Pairs that turn more than `high` times within the original context keep their frequency, those that turn less
    than `low` times are slowed by `factor`, those between are mixed. In float32 throughout, as transformers and the
    engine's converter have it; their `pow` may differ from numpy's in the last bit.
    """
    f32 = np.float32
    exponents = np.arange(0, n_rot, 2, dtype=np.float32) / f32(n_rot)
    wavelength = f32(2 * math.pi) / (f32(1) / f32(base) ** exponents)
    turns = f32(original) / wavelength
    share = ((turns - f32(low)) / f32(high - low)).clip(0, 1) if high != low else (turns > f32(low)).astype(np.float32)
    divisors: Float32Array = (f32(1) / ((f32(1) - share) / f32(factor) + share)).astype(np.float32)
    return divisors


def matrix(
    blk: str, gguf: str, hf: str, n_out: int, n_in: int, *, layout: Layout = PLAIN, bias: bool | None = False
) -> list[TensorRule]:
    """A projection's weight and, where `bias` is True (required) or None (may be there), its bias.

    `blk` is the GGUF prefix (`blk.3.`), `hf` the Hugging Face name without `.weight`.
    """
    rules = [TensorRule(f"{blk}{gguf}.weight", (n_out, n_in), (hf + ".weight",), layout)]
    if bias is not False:
        rules.append(TensorRule(f"{blk}{gguf}.bias", (n_out,), (hf + ".bias",), layout, required=bool(bias)))
    return rules


def vector(blk: str, gguf: str, hf: str, size: int, *, layout: Layout = PLAIN) -> TensorRule:
    """A norm's weight."""
    return TensorRule(f"{blk}{gguf}.weight", (size,), (hf + ".weight",), layout)
