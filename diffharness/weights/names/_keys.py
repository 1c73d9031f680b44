"""Hyperparameters and tensors that most decoders share, between config.json and GGUF keys.

Keys under `diffharness.` are ours: what a checkpoint says that GGUF has no key for; the engine ignores them, and an
artifact from elsewhere lacks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.weights.names._config import (
    LLAMA3_ROPE,
    llama3_divisors,
    need_float,
    need_int,
    rope_config,
    rope_metadata,
    rope_parameters,
)
from diffharness.weights.names._map import PLAIN, Config, Layout, Sizes, TensorRule
from diffharness.weights.source import Metadata

_LARGEST = (1 << 31) - 1
_MOST_LAYERS = 4096
_MOST_EXPERTS = 65536

TIED_HEAD = "diffharness.tied_head"  # bool: the output head is the embedding

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


# Keys that some files repeat for every layer although the same holds for all.
_MAY_REPEAT = frozenset({"attention.head_count", "attention.head_count_kv", "feed_forward_length"})


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
        if name in _MAY_REPEAT and isinstance(value, (list, tuple)) and len({*self.by_layer(name)}) == 1:
            return self.by_layer(name)[0]
        return self._whole(name, value)

    def by_layer(self, name: str, default: int | None = None) -> list[int]:
        """One whole number (or truth value) per layer, also where the metadata state one for all."""
        value = self[name] if default is None else self.get(name, default)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * self.n_layer
        if len(values) < self.n_layer:
            raise ArtifactFileError(f"metadata key `{name}`: expected {self.n_layer} values, found {len(values)}")
        return [self._whole(name, value) for value in values]

    def _whole(self, name: str, value: Any) -> int:
        if isinstance(value, (list, tuple)):
            raise UnsupportedError(
                f"metadata key `{name}` differs by layer, which this tool does not know of "
                f"{self.metadata['general.architecture']} models"
            )
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
        """The length of the tokenizer's list, by which llama.cpp shapes the embedding; without one `vocab_size`."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, (list, tuple)) and tokens:
            return len(tokens)
        return self.integer("vocab_size")


def decoder_example(
    sizes: Sizes, model_type: str, architecture: str, *, rope_theta: float | None = 5e3, **more: Any
) -> dict[str, Any]:
    """config.json of a synthetic decoder: what every decoder states, with `more` over it; None leaves a key out.

    The epsilon is large enough to be seen, heads are wider than width / heads, and the head is not tied.
    """
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head_kv,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.n_ctx,
        "rms_norm_eps": 1e-3,
        "rope_theta": rope_theta,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return {key: value for key, value in (out | more).items() if value is not None}


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
