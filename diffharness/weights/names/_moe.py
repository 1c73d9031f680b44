"""Tensors of routed experts: one stack per matrix in GGUF, one tensor per expert (or a fused pair) elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffharness.weights.names._map import PLAIN, STACK, Layout, TensorRule
from diffharness.weights.source import Float32Array

# How checkpoints call an expert's matrices: most of them, and those after Mixtral.
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}


@dataclass(frozen=True)
class FusedHalf:
    """One half of a stack that keeps gate and up of each expert in one tensor [n_expert, 2 · n_ff, n_embd].

    For reading the spelling that transformers has in memory; single experts are what is written.
    """

    half: int  # 0: gate, 1: up
    rowwise: bool = True  # each expert's half comes from that expert's pair

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        size = parts[0].shape[1] // 2
        return np.ascontiguousarray(parts[0][:, self.half * size : (self.half + 1) * size])

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        raise TypeError("half of a fused tensor cannot be written by itself")


def expert_rules(
    blk: str, hf: str, names: Mapping[str, str], *, fused: str, n_expert: int, n_ff: int, n_embd: int
) -> list[TensorRule]:
    """The router and the stacks of gate, up and down.

    `hf` is the block's Hugging Face prefix, in which experts are `experts.N.<names[part]>.weight`; `fused` the prefix
    of transformers' fused spelling, `experts.gate_up_proj` and `experts.down_proj`, and of its `gate.weight`.
    """

    def stack(part: str, n_out: int, n_in: int, alias: str, layout: Layout) -> TensorRule:
        return TensorRule(
            f"{blk}ffn_{part}_exps.weight",
            (n_expert, n_out, n_in),
            tuple(f"{hf}experts.{i}.{names[part]}.weight" for i in range(n_expert)),
            STACK,
            aliases=(((f"{fused}experts.{alias}",), layout),),
        )

    router_aliases = (((fused + "gate.weight",), PLAIN),) if fused != hf else ()
    return [
        TensorRule(blk + "ffn_gate_inp.weight", (n_expert, n_embd), (hf + "gate.weight",), aliases=router_aliases),
        stack("gate", n_ff, n_embd, "gate_up_proj", FusedHalf(0)),
        stack("up", n_ff, n_embd, "gate_up_proj", FusedHalf(1)),
        stack("down", n_embd, n_ff, "down_proj", PLAIN),
    ]
