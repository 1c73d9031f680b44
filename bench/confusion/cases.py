"""The cases: clean files of every common type, damage from blatant to subtle, wrong metadata, broken files, lineage.

A case names a clean file (model, types, importance weights) and what is done to it. What it is is known because
it was made so; nothing here looks at what the judges make of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Truth = Literal["clean", "weights", "metadata", "file", "lineage"]
Weighting = Literal["none", "chi-square", "log-normal"]

EMBEDDED = "tiny-gemma4"
TUNED = ("tiny-gemma4-tuned-6", "tiny-gemma4-tuned-24")  # trained on for so many steps
OTHER_SEED = "tiny-gemma4-other-seed"


@dataclass(frozen=True)
class Base:
    """A clean file. `kind` is a type for every matrix, or one of llama.cpp's mixtures."""

    model: str
    kind: str
    weighting: Weighting = "none"

    @property
    def label(self) -> str:
        return f"{self.model} {self.kind}" + ("" if self.weighting == "none" else f" {self.weighting}")


@dataclass(frozen=True)
class Case:
    """One file and what is true of it. `patterns`: at least one of these kinds is to be named by `inspect`."""

    base: Base
    truth: Truth
    how: tuple[str, ...] = ()
    tensors: str | None = None
    layers: str | None = None
    set_keys: tuple[str, ...] = ()
    patterns: frozenset[str] = frozenset()
    quick: bool = False  # one of the few that every run of the tests judges
    seed: int = 0

    @property
    def name(self) -> str:
        what = " + ".join((*self.how, *self.set_keys))
        where = " ".join(part for part in (self.tensors, self.layers and f"layers {self.layers}") if part)
        return f"{self.base.label}: {what or self.truth}" + (f" ({where})" if where else "")


# -- clean --------------------------------------------------------------------------------------------

_SINGLE = (
    "F32 F16 BF16 Q8_0 Q6_K Q5_K Q4_K Q3_K Q2_K Q4_0 Q4_1 Q5_0 Q5_1 IQ4_XS IQ4_NL IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS"
).split()
_MIXTURES = ("Q4_K_M", "Q3_K_M", "Q2_K")
_FLOATS = ("F32", "F16", "BF16")
_TINY = [
    ("llama", "Q4_K"), ("llama", "Q8_0"), ("llama", "IQ3_XXS"), ("qwen3moe", "Q4_K"), ("qwen3moe", "IQ4_XS"),
    ("gemma3", "Q6_K"), ("gemma3", "IQ2_XS"), ("qwen2", "Q5_0"), ("qwen2", "Q4_1"), ("mixtral", "Q3_K"),
    ("mixtral", "Q2_K"), ("gemma2", "Q5_K"),
]  # fmt: skip


def _clean() -> Iterator[Case]:
    quick = {("Q4_K_M", "none"), ("IQ3_XXS", "log-normal"), ("Q2_K", "chi-square")}
    for i, kind in enumerate([*_SINGLE, *(f"{mixture}*" for mixture in _MIXTURES)]):
        mixture = kind.endswith("*")
        kind = kind.removesuffix("*")
        weightings: tuple[Weighting, ...] = ("none",)
        if kind not in _FLOATS:
            weightings = (
                ("none", "chi-square", "log-normal") if mixture else ("none", ("chi-square", "log-normal")[i % 2])
            )
        for weighting in weightings:
            label = f"mixture-{kind}" if mixture else kind
            yield Case(Base(EMBEDDED, label, weighting), "clean", quick=mixture and (kind, weighting) in quick)
    for model, kind in _TINY:
        for weighting in ("none", "log-normal"):
            yield Case(Base(model, kind, weighting), "clean", quick=(model, weighting) == ("qwen3moe", "log-normal"))


# -- damage -------------------------------------------------------------------------------------------

_P = frozenset
_NOISE = _P({"noise", "unexplained", "unrelated"})
_BLOCKS = _P({"zeroed_blocks", "block_scales", "flipped_bits", "isolated_blocks", "non_finite_blocks"})
_PERIOD = _P({"periodic"})
_DOWN, _UP, _Q, _K = "blk.{}.ffn_down.weight", "blk.{}.ffn_up.weight", "blk.{}.attn_q.weight", "blk.{}.attn_k.weight"

# how, tensors, layers, patterns, quick
_Row = tuple[str, str | None, str | None, frozenset[str], bool]
_ON_EMBEDDED: list[_Row] = [
    ("issue-6056:0.45", None, None, _PERIOD, True),
    ("issue-6056:0.9", None, None, _PERIOD, False),
    ("issue-6056:0.99", None, None, _PERIOD, False),
    ("attention-drift:3", None, None, _NOISE, True),
    ("attention-drift:12", None, None, _NOISE, False),
    ("scale:2", _DOWN.format(3), None, _P({"scale"}), False),
    ("scale:1.3", "blk.*.attn_q.weight", "4-7", _P({"scale"}), True),
    ("scale:1.1", _DOWN.format(3), None, _P({"scale"}), False),
    ("scale:1.03", _DOWN.format(3), None, _P({"scale"}), False),
    ("scale:1.03", "blk.*.weight", None, _P({"scale"}), False),
    ("scale:0.8", "token_embd.weight", None, _P({"scale"}), False),
    ("offset:1", "blk.*.attn_norm.weight", None, _P({"offset"}), False),
    ("offset:-1", "blk.7.ffn_norm.weight", None, _P({"offset"}), False),
    ("offset:0.02", "blk.*.ffn_norm.weight", None, _P({"offset"}), False),
    ("constant:1", "blk.*.layer_output_scale.weight", None, _P({"constant"}), True),
    ("constant:1", "blk.5.post_attention_norm.weight", None, _P({"constant"}), False),
    ("noise:0", "blk.*.weight", "8", _NOISE, False),
    ("noise:5", "blk.*.ffn_*.weight", "4-8", _NOISE, False),
    ("noise:10", _UP.format(2), None, _NOISE, False),
    ("noise:15", "blk.*.ffn_down.weight", None, _NOISE, False),
    ("noise:20", "blk.*.ffn_down.weight", None, _NOISE, False),
    ("noise:25", "blk.*.ffn_down.weight", None, _NOISE, False),
    ("noise:20", "blk.*norm.weight", None, _NOISE, False),
    ("noise:10", "blk.*.attn_*.weight", "5,11", _NOISE, False),
    ("permuted-rows", _UP.format(4), None, _P({"permuted_rows"}), False),
    ("permuted-rows:0.02", _UP.format(4), None, _P({"permuted_rows"}), False),
    ("permuted-heads", _Q.format(3), None, _P({"permuted_heads"}), True),
    ("permuted-heads", "blk.*.attn_q.weight", None, _P({"permuted_heads"}), False),
    ("permuted-layers", None, None, _P({"permuted_layers"}), True),
    ("permuted-layers:0.2", None, None, _P({"permuted_layers", "exchanged"}), False),
    ("transposed", "blk.1.ffn_up.weight", None, _P({"transposed"}), True),
    ("rope-interleaved", None, None, _P({"rotary_order"}), True),
    ("rope-interleaved", _K.format(2), None, _P({"rotary_order"}), False),
    ("swapped-gate-up", None, "6", _P({"gate_up_exchanged"}), True),
    ("swapped-gate-up", None, None, _P({"gate_up_exchanged"}), False),
    ("swapped-k-v", None, None, _P({"k_v_exchanged"}), False),
    ("swapped:1", "blk.*.weight", None, _P({"exchanged", "permuted_layers"}), False),
    ("duplicated:1", "blk.*.ffn_down.weight", None, _P({"duplicated", "repeated_layers"}), True),
    ("duplicated:3", "blk.*.attn_q.weight", None, _P({"duplicated", "repeated_layers"}), False),
    ("zero-blocks:0.05", _DOWN.format(3), None, _P({"zeroed_blocks"}), True),
    ("zero-blocks:0", "blk.*.ffn_down.weight", None, _P({"zeroed_blocks"}), False),
    ("garbled-blocks:0.2", _UP.format(9), None, _BLOCKS | _NOISE, False),
    ("garbled-blocks:0", _UP.format(9), None, _BLOCKS, False),
    ("wrong-scales:0.5", _DOWN.format(2), None, _BLOCKS | _NOISE, False),
    ("wrong-scales:0.01", _DOWN.format(2), None, _BLOCKS, False),
    ("double-scales:0.02", _DOWN.format(2), None, _BLOCKS, False),
    ("bit-flips:1", _DOWN.format(6), None, _P(), False),
    ("bit-flips:64", _DOWN.format(6), None, _P(), False),
    ("bit-flips:4000", _DOWN.format(6), None, _P(), False),
    ("byte-shift:1", _UP.format(1), None, _P({"displaced_bytes"}), False),
    ("byte-shift:144", _UP.format(1), None, _P({"displaced_bytes", "permuted_rows"}), False),  # a row is 144 bytes
    ("one-value:100", _DOWN.format(0), None, _P(), False),
    ("one-value:8", _DOWN.format(0), None, _P(), False),
    ("one-channel:8", _DOWN.format(4), None, _P({"scaled_columns"}), False),
    ("one-channel:1.5", _DOWN.format(4), None, _P({"scaled_columns"}), False),
    ("zero-rows:0.1", _UP.format(3), None, _P(), False),
    ("zero-rows:0.004", _UP.format(3), None, _P(), False),
    ("clip:0.05", "blk.*.ffn_up.weight", None, _P({"clipped"}), False),
    ("clip:0.001", "blk.*.ffn_up.weight", None, _P({"clipped"}), False),
    ("missing", None, None, _P(), False),
    ("f16-underflow:0.5", _UP.format(3), None, _P(), False),
    ("f16-underflow:0.1", _UP.format(3), None, _P(), False),
    # As quiet as can be: nobody need find these unless they move the perplexity.
    ("scale:1.005", _DOWN.format(3), None, _P(), False),
    ("scale:1.005", "blk.*.ffn_down.weight,blk.*.ffn_up.weight", None, _P(), False),
    ("noise:30", "blk.*.ffn_down.weight,blk.*.ffn_up.weight", None, _P(), False),
    ("noise:40", "blk.*.attn_q.weight,blk.*.attn_k.weight,blk.*.attn_output.weight", None, _P(), False),
    ("one-value:3", _DOWN.format(0), None, _P(), False),
    ("one-channel:1.1", _DOWN.format(4), None, _P(), False),
    ("clip:0.0001", _UP.format(3), None, _P(), False),
    ("f16-underflow:0.02", "blk.*.ffn_up.weight", None, _P(), False),
]  # fmt: skip

_FILES = ["nan-block:1", "truncated:0.5", "truncated:0.999", "f16-overflow:0.01"]

# model, faults and keys that are set, quick; without their key llama.cpp caps logits at 30, and scores at 50
_METADATA: list[tuple[str, tuple[tuple[str, ...], tuple[str, ...]], bool]] = [
    (EMBEDDED, (("rope-base-lost",), ()), True),
    (EMBEDDED, (("rope-base-swa:2",), ()), False),
    (EMBEDDED, (("rope-base-swa:1.01",), ()), False),
    (EMBEDDED, (("eps-hard-coded:0.01",), ()), False),
    (EMBEDDED, (("eps-hard-coded:0.00001",), ()), False),
    (EMBEDDED, ((), ("gemma4.final_logit_softcapping=float:15",)), False),
    ("gemma2", (("softcap-lost",), ()), False),
    (EMBEDDED, (("window-scaled:0.5",), ()), False),
    (EMBEDDED, (("rope-half",), ()), False),
    ("llama-linear", (("rope-scaling-lost",), ()), False),
    ("qwen3moe", (("experts-used:1",), ()), False),
    ("gemma2", (("attn-softcap-lost",), ()), False),
    ("qwen2", (("rope-base-scaled:0.01",), ()), False),
]

# model, type, how, tensors, layers, patterns, quick
_ON_TINY: list[tuple[str, str, str, str | None, str | None, frozenset[str], bool]] = [
    ("llama", "Q8_0", "rope-half-split", None, None, _P({"rotary_order"}), True),
    ("llama", "Q4_K", "rope-half-split", "blk.*.attn_k.weight", None, _P({"rotary_order"}), False),
    ("llama", "Q4_K", "rope-all-heads", None, None, _P({"rotary_order"}), False),
    ("llama", "Q4_K", "permuted-heads", "blk.1.attn_k.weight", None, _P({"permuted_heads"}), False),
    ("llama", "Q5_K", "permuted-layers", None, None, _P({"permuted_layers"}), False),
    ("llama", "Q4_0", "scale:1.2", "blk.1.attn_output.weight", None, _P({"scale"}), False),
    ("llama", "F16", "one-value:20", "blk.1.ffn_down.weight", None, _P(), False),
    ("llama", "BF16", "bit-flips:1", "blk.1.ffn_down.weight", None, _P(), False),
    ("llama", "BF16", "byte-shift:2", "blk.1.ffn_down.weight", None, _P({"displaced_bytes"}), False),
    ("llama-llama3", "Q8_0", "rope-freqs-missing", None, None, _P(), False),
    ("qwen2", "Q5_0", "transposed", "blk.2.attn_q.weight", None, _P({"transposed"}), False),
    ("qwen2", "Q8_0", "offset:0.5", "blk.1.attn_q.bias", None, _P({"offset"}), False),
    ("qwen2", "Q4_1", "duplicated:1", "blk.*.attn_k.weight", None, _P({"duplicated", "repeated_layers"}), False),
    ("qwen2", "Q4_1", "wrong-scales:0.3", "blk.0.ffn_up.weight", None, _BLOCKS | _NOISE, False),
    ("gemma3", "Q6_K", "offset:-1", "blk.*norm.weight", None, _P({"offset"}), True),
    ("gemma3", "Q6_K", "scale:1.15", "blk.*.ffn_*.weight", "2-4", _P({"scale"}), False),
    ("gemma3", "Q4_K", "noise:12", "blk.*.attn_q.weight", None, _NOISE, False),
    ("gemma2", "Q5_K", "swapped-gate-up", None, "2", _P({"gate_up_exchanged"}), False),
    ("qwen3moe", "Q8_0", "permuted-experts", "blk.1.ffn_up_exps.weight", None, _P({"permuted_experts"}), True),
    ("qwen3moe", "Q4_K", "permuted-experts", None, None, _P({"permuted_experts"}), False),
    ("qwen3moe", "Q4_K", "swapped-gate-up", None, None, _P({"gate_up_exchanged"}), False),
    ("qwen3moe", "Q4_K", "zero-blocks:0.01", "blk.1.ffn_down_exps.weight", None, _P({"zeroed_blocks"}), False),
    ("qwen3moe", "Q4_K", "permuted-rows", "blk.1.ffn_gate_inp.weight", None,
     _P({"permuted_rows", "permuted_experts"}), False),
    ("mixtral", "Q3_K", "permuted-experts", None, None, _P({"permuted_experts"}), False),
    ("mixtral", "Q3_K", "noise:3", "blk.2.ffn_down_exps.weight", None, _NOISE, False),
]  # fmt: skip

# On files with importance weights, whose tensors are off the control already.
_WEIGHTED: list[_Row] = [
    ("scale:1.3", _DOWN.format(3), None, _P({"scale"}), False),
    ("noise:8", "blk.*.attn_v.weight", None, _NOISE, False),
    ("permuted-heads", _Q.format(3), None, _P({"permuted_heads"}), False),
    ("zero-blocks:0", _DOWN.format(3), None, _P({"zeroed_blocks"}), False),
    ("swapped-gate-up", None, "6", _P({"gate_up_exchanged"}), False),
]


def _damaged() -> Iterator[Case]:
    base = Base(EMBEDDED, "mixture-Q4_K_M")
    for how, tensors, layers, patterns, quick in _ON_EMBEDDED:
        yield Case(base, "weights", (how,), tensors, layers, patterns=patterns, quick=quick)
    for how, tensors, layers, patterns, _ in _WEIGHTED:
        for kind, weighting in (("mixture-Q4_K_M", "log-normal"), ("mixture-Q2_K", "chi-square")):
            weighted = Base(EMBEDDED, kind, weighting)  # type: ignore[arg-type]
            yield Case(weighted, "weights", (how,), tensors, layers, patterns=patterns)
    for model, kind, how, tensors, layers, patterns, quick in _ON_TINY:
        yield Case(Base(model, kind), "weights", (how,), tensors, layers, patterns=patterns, quick=quick)
    for how in _FILES:
        where = {"nan-block:1": "blk.4.ffn_down.weight", "f16-overflow:0.01": "blk.4.attn_norm.weight"}.get(how)
        yield Case(base, "file", (how,), where, quick=how == "nan-block:1")
    for model, (hows, keys), quick in _METADATA:
        yield Case(Base(model, "Q8_0"), "metadata", hows, set_keys=keys, quick=quick)
    # Two faults at once: both are to be named.
    yield Case(Base(EMBEDDED, "Q8_0"), "weights", ("scale:1.4", "rope-base-swa:3"), _DOWN.format(5),
               patterns=_P({"scale"}))  # fmt: skip


def _lineage() -> Iterator[Case]:
    for model in (*TUNED, OTHER_SEED):
        for kind in ("mixture-Q4_K_M", "Q8_0", "BF16"):
            yield Case(Base(model, kind), "lineage", quick=False)


CASES: tuple[Case, ...] = (*_clean(), *_damaged(), *_lineage())
