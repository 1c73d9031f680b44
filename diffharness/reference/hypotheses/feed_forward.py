"""The feed-forward: which activation, on which projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hypotheses._altering import Replacement, altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import GGML, Arithmetic, State
from diffharness.reference.steps import Steps
from diffharness.taps import split

ACTED = frozenset({"ffn_act", "moe_experts"})
PROJECTED = frozenset({"ffn_gate", "ffn_up", "moe_experts"})

Activation = Callable[[Tensor, Arithmetic], Tensor]


def gelu_quick(x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """x · sigmoid(1.702 x); with ggml's table the argument and the result are rounded to float16."""
    if not arithmetic.gelu_f16_table:
        return x * torch.sigmoid(1.702 * x)
    half = x.to(torch.float16).float()
    return (half * torch.sigmoid(1.702 * half)).to(torch.float16).to(x.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda x, a: F.silu(x),
    "gelu in its tanh form": ops.gelu_tanh,
    # A model that has no use for the table is compared without it, also where the engine took it.
    "gelu in its tanh form, from ggml's float16 table": lambda x, a: ops.gelu_tanh(x, GGML),
    "gelu with erf": lambda x, a: F.gelu(x),
    "quick gelu": gelu_quick,
    "relu": lambda x, a: F.relu(x),
    "the square of relu": lambda x, a: F.relu(x).square(),
    "sigmoid": lambda x, a: torch.sigmoid(x),
    "tanh": lambda x, a: torch.tanh(x),
    "absent": lambda x, a: x,
}


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on the feed-forward."""
    if not scene.in_layer or not scene.may_begin_at(ACTED | PROJECTED):
        return
    for name, act in ACTIVATIONS.items():
        says = f"the feed-forward's activation were {name}"
        yield Hypothesis("activation.other", says, ACTED, _acting(act))
    yield _gated(
        "up-activated",
        "the activation were applied to up, not to gate",
        lambda me, plain, gate, up, state: plain(up, gate, state),
    )
    yield _gated("up-alone", "the feed-forward had no gate", lambda me, plain, gate, up, state: me.act(up, state))
    yield _gated(
        "gate-alone", "up were left out of the feed-forward", lambda me, plain, gate, up, state: me.act(gate, state)
    )
    yield _gated(
        "both-activated",
        "gate and up were both activated",
        lambda me, plain, gate, up, state: plain(gate, me.act(up, state), state),
    )
    yield _gated("up-plus-one", "1 were added to up", lambda me, plain, gate, up, state: plain(gate, up + 1, state))
    swap = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate", "ffn_gate_exps": "ffn_up_exps", "ffn_up_exps": "ffn_gate_exps"}
    says = "the gate and up projections were exchanged"
    yield Hypothesis("feed-forward.exchanged", says, PROJECTED, seeing(rename=lambda name: _exchanged(name, swap)))


def _acting(act: Activation) -> Callable[[Steps], Steps]:
    def step(me: Steps, plain: Callable[..., Tensor], gate: Tensor, state: State) -> Tensor:
        return act(gate, state.arithmetic)

    return lambda model: altered(model, act=step)


def _gated(name: str, says: str, gated: Replacement) -> Hypothesis:
    return Hypothesis(f"feed-forward.{name}", says, ACTED, lambda model: altered(model, gated=gated))


def _exchanged(name: str, swap: dict[str, str]) -> str:
    layer, rest = split(name)
    stem, _, kind = rest.partition(".")
    return f"blk.{layer}.{swap[stem]}.{kind}" if layer is not None and stem in swap else name
