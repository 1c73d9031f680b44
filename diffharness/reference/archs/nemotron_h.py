"""`nemotron_h`, `nemotron_h_moe`: Nemotron H and Nemotron 3. One block a layer: Mamba 2, attention or feed-forward.

Attention has no rotary embedding. Feed-forwards square what ReLU leaves and have no gate; with experts the router
takes the sigmoid, a bias chooses, and the routed experts may work in a narrower space than the model (`latent`).
A layer is a feed-forward if it has a width, else attention if it has KV heads. Blocks that predict further tokens come
after the model's layers and are not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import mamba, moe, ops
from diffharness.reference.decoder import read_routing
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hybrid import Hybrid
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.nextn import without_nextn


@dataclass(frozen=True, kw_only=True)
class NemotronH(Hybrid):
    """A `Hybrid` with one block a layer."""

    sizes: mamba.MambaSizes
    feeds: tuple[bool, ...]  # by layer: a feed-forward

    activation: ClassVar[str] = "relu_sqr"
    eps_key: ClassVar[str] = "attention.layer_norm_epsilon"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        for name in ("expert_used_count", "expert_feed_forward_length"):
            if isinstance(value := hp.metadata.get(hp.key(name)), (list, tuple)):
                hp.refuse(name, value, "one number for all layers")
        hp = without_nextn(hp)
        out = super().read(hp)
        feeds = tuple(n > 0 for n in hp.integers("feed_forward_length", out["n_layer"]))
        if out["n_expert"]:
            out |= read_routing(hp, gating="sigmoid", grouped=True)
            hp.integer("expert_shared_count", 0)  # one MLP in any case
            if out["gating"] != "sigmoid" or out["n_dense"]:
                hp.refuse("expert_gating_func", out["gating"], "sigmoid, and no leading dense layers")
        return out | {
            "eps": hp.number("attention.layer_norm_rms_epsilon", out["eps"]),
            "n_rot": 0,
            "feeds": feeds,
            "recurrent": tuple(r and not feed for r, feed in zip(out["recurrent"], feeds, strict=True)),
            "sizes": mamba.MambaSizes.read(hp, heads=True),
        }

    def layer_kind(self, il: int) -> str:
        return "feed-forward" if self.feeds[il] else super().layer_kind(il)

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        h = self.before_attention(w, il, x, tap)
        h = self.feed_forward(w, il, h, state, tap) if self.feeds[il] else self.mixer(w, il, h, state, tap)
        return self.end_layer(w, il, self.add(x, h), tap)

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        return mamba.head_mixer(w, f"blk.{il}.", h, self.sizes, tap, eps=self.eps)

    def experts(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        logits = ops.project(w, blk + "ffn_gate_inp", h)
        tap("moe_logits", logits)
        weights, chosen = self.route(logits, w.find(blk + "exp_probs_b.bias"))
        narrow = ops.project(w, blk + "ffn_latent_down", h) if w.has(blk + "ffn_latent_down.weight") else h
        out = moe.mix(narrow, weights, chosen, lambda index, x: self.expert(w, blk, index, x, state))
        tap("moe_experts", out)
        if w.has(blk + "ffn_latent_up.weight"):
            out = ops.project(w, blk + "ffn_latent_up", out)
        return out + self.shared_expert(w, blk, h, state, tap)


ARCHS = {"nemotron_h": NemotronH.from_metadata, "nemotron_h_moe": NemotronH.from_metadata}
