"""What the reference runner and an architecture's file agree on.

An architecture is a frozen dataclass of hyperparameters (`from_metadata`) with three functions, `embed`,
`layer` and `head` (`reference.steps.Steps`). Everything has a leading batch axis: independent chunks of text, or the
same chunk twice (once on the reference's own layer inputs, once on the engine's). Weights are asked
for by GGUF name at the moment of use and let go after it, so that no more than a tensor or two of a
layer are in memory. Nothing here disables autograd; the runner does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Tap = Callable[[str, Tensor], None]
"""Called with a tap's name (inside a layer without `blk.N.`) and its value [batch, tokens, width]."""

Watch = Callable[[Tensor, Tensor, int, int], None]
"""Called with a block of attention weights [batch, KV heads, group, queries, keys], which keys each query does not
see [queries, keys], and the positions of the first query and the first key; good during the call only."""


def unheard(name: str, value: Tensor) -> None:
    """The tap of a forward that nobody listens to: what only its taps would show need not be made."""


@dataclass(frozen=True)
class KvCache:
    """What keys and values are kept as between their making and their use."""

    type_k: str = "F16"
    type_v: str = "F16"
    flash: bool = True  # flash attention; without it attention weights are rounded as well

    @property
    def rounds_queries(self) -> bool:
        """Flash attention leaves them alone where it goes tile by tile, with keys and values both in F16, or in F32."""
        return not self.flash or self.type_k != self.type_v or self.type_k not in ("F16", "F32")


@dataclass(frozen=True)
class Arithmetic:
    """ggml's CPU arithmetic where it is coarser than float32 by design; all off in the definition.

    The first three hold for every run of ggml; the other two for one on the file as it is (`reference.rounding`).
    """

    gelu_f16_table: bool = False  # GELU looked up by the float16 input, float16 results
    gelu_erf_as_tanh: bool = False  # GELU's tanh form where the model has erf
    rope_f32_angles: bool = False  # angles made in float32 by repeated multiplication
    rounded_activations: bool = False  # before a product with a matrix of the file, to the type that suits the matrix's
    kv_cache: KvCache | None = None

    @property
    def conventions(self) -> tuple[str, ...]:
        """Names of the conventions that are on."""
        return tuple(name for name, on in vars(self).items() if on)


DEFINITION = Arithmetic()
GGML = Arithmetic(gelu_f16_table=True, rope_f32_angles=True)


class Weights(Protocol):
    """Tensors by GGUF name, in the forward's dtype and on its device."""

    def get(self, name: str) -> Tensor:
        """The whole tensor; KeyError if the model has none of that name."""
        ...

    def find(self, name: str) -> Tensor | None:
        """The whole tensor, or None if the model has none of that name."""
        ...

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        """Rows (or experts) of the first axis."""
        ...

    def has(self, name: str) -> bool: ...

    def n_rows(self, name: str) -> int:
        """Length of the first axis."""
        ...


@dataclass
class State:
    """What layers hand on beside the residual stream."""

    positions: Tensor  # [tokens], int64
    arithmetic: Arithmetic = DEFINITION
    shared_kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer, where later layers reuse it
    per_layer_inputs: Tensor | None = None  # [batch, tokens, n_layer, n_embd_per_layer] (Gemma 4 E models)
    watch: Watch | None = None  # who looks at this layer's attention weights
