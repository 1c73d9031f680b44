"""How one architecture's names, layouts and hyperparameters translate between Hugging Face and GGUF.

Each architecture is one `ArchMap` in one file of this package. `metadata` and `config` translate
hyperparameters; `rules` lists every tensor that a model with those hyperparameters has, with its
shape, the Hugging Face tensors that it is made of, and the layout between the two. From this list
follow: reading a checkpoint in GGUF's terms, writing a checkpoint as GGUF, writing a GGUF as a
checkpoint, and telling which tensors of a file are missing, extra or misshapen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffharness.weights.source import Float32Array, Metadata

Config = Mapping[str, Any]  # config.json; the text model's part of it where it has several


Draw = Callable[[np.random.Generator, tuple[int, ...]], Float32Array]


@dataclass(frozen=True)
class Sizes:
    """How large a synthetic model is to be; an architecture takes of these what it has."""

    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 96
    n_vocab: int = 160
    n_expert: int = 6
    n_expert_used: int = 2
    n_ff_expert: int = 64
    window: int = 24
    n_ctx: int = 256


class Layout(Protocol):
    """The change of layout between Hugging Face tensors and one GGUF tensor; exact in both directions."""

    @property
    def rowwise(self) -> bool:
        """Rows of the GGUF tensor are the rows of the one Hugging Face tensor, in order."""
        ...

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array: ...
    def to_hf(self, tensor: Float32Array) -> list[Float32Array]: ...


@dataclass(frozen=True)
class Plain:
    """The same values in the same order (reshaped to `shape` where the two differ)."""

    rowwise: bool = True

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return parts[0]

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [tensor]


@dataclass(frozen=True)
class AddOne:
    """Gemma 1-3 keep norm weights as w - 1 in the checkpoint and as w in the GGUF; added in float32."""

    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return parts[0] + np.float32(1)

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [tensor - np.float32(1)]


@dataclass(frozen=True)
class RotaryPairs:
    """Rows of each head from half-split order (Hugging Face) to interleaved pairs (ggml's NORM rope).

    Applies to llama's Q and K, weights and biases: head row i of the first half becomes row 2i, of
    the second half row 2i + 1. `n_head` is the number of heads of this very tensor (K: KV heads).
    """

    n_head: int
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        [rows] = parts
        return rows[self._half_split_rows(len(rows))]

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        rows = np.empty_like(tensor)
        rows[self._half_split_rows(len(tensor))] = tensor
        return [rows]

    def _half_split_rows(self, n_rows: int) -> NDArray[np.int64]:
        """For each interleaved row, the half-split row that it is: 0, h, 1, h + 1, ... in a head of 2h rows."""
        head = n_rows // self.n_head
        within = np.arange(head) % 2 * (head // 2) + np.arange(head) // 2
        return (np.arange(self.n_head)[:, None] * head + within).ravel()


@dataclass(frozen=True)
class Stack:
    """One Hugging Face tensor per expert, stacked along a new first axis."""

    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.stack(parts)

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return list(tensor)


@dataclass(frozen=True)
class Transposed:
    """The matrix with rows and columns exchanged (GPT-2's `Conv1D`)."""

    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.ascontiguousarray(parts[0].T)

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [np.ascontiguousarray(tensor.T)]


@dataclass(frozen=True)
class Shaped:
    """The same values in the same order, in another shape on Hugging Face's side."""

    gguf: tuple[int, ...]
    hf: tuple[int, ...]
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return parts[0].reshape(self.gguf)

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [tensor.reshape(self.hf)]


@dataclass(frozen=True)
class Mapped:
    """Values that are kept otherwise on each side, such as A = -exp(A_log): `there` to GGUF, `back` from it."""

    there: Callable[[Float32Array], Float32Array]
    back: Callable[[Float32Array], Float32Array]
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return self.there(parts[0])

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [self.back(tensor)]


@dataclass(frozen=True)
class Joined:
    """Several Hugging Face tensors one after another along the first axis, `rows` of each."""

    rows: tuple[int, ...]
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.concatenate(parts)

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return np.split(tensor, np.cumsum(self.rows)[:-1])


@dataclass(frozen=True)
class Piece:
    """A part of one Hugging Face tensor, of shape `hf`, whose other parts are other GGUF tensors.

    `view(whole)` gives the part as a view into the whole, in any shape of the right order: reading copies from it,
    writing (which gathers the parts of a tensor) copies to it.
    """

    hf: tuple[int, ...]
    view: Callable[[Float32Array], Float32Array]
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.ascontiguousarray(self.view(parts[0].reshape(self.hf)))

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        """The whole with only this part filled in."""
        whole = np.zeros(self.hf, dtype=np.float32)
        self.put(tensor, whole)
        return [whole]

    def put(self, tensor: Float32Array, whole: Float32Array) -> None:
        """Write this part into `whole`."""
        view = self.view(whole)
        view[...] = tensor.reshape(view.shape)


@dataclass(frozen=True)
class PaddedRows:
    """The first `n_stored` rows are the checkpoint's; GGUF has rows of zeros behind them."""

    n_stored: int
    n_rows: int
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        [rows] = parts
        return np.concatenate((rows, np.zeros((self.n_rows - len(rows), *rows.shape[1:]), dtype=np.float32)))

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [tensor[: self.n_stored]]


@dataclass(frozen=True)
class Packed:
    """Numbers of fewer than eight bits in tensors of bytes, whose `shapes` these are; for reading only.

    Bytes come as floats. `type` is ggml's name of how the numbers are kept.
    """

    shapes: tuple[tuple[int, ...], ...]
    type: str
    rowwise: bool = True

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        raise NotImplementedError

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        raise TypeError("packed numbers cannot be written")


PLAIN = Plain()
TRANSPOSED = Transposed()
ADD_ONE = AddOne()
STACK = Stack()


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a model: its GGUF name and shape, and what it is made of in the checkpoint.

    `hf` names the Hugging Face tensors (one per expert under `STACK`); where a checkpoint may spell
    a name in several ways, `aliases` lists the other spellings of `hf` as whole tuples, with the
    layout that goes with each. A rule without `hf` is computed from the hyperparameters (`values`).
    `draw(generator, shape)` makes a synthetic model's values where the name and shape alone would make senseless ones;
    `synthetic` says whether a synthetic model has the tensor; unless stated it has it if every model does.
    """

    name: str
    shape: tuple[int, ...]
    hf: tuple[str, ...] = ()
    layout: Layout = PLAIN
    required: bool = True
    aliases: tuple[tuple[tuple[str, ...], Layout], ...] = ()
    values: Callable[[], Float32Array] | None = None
    draw: Draw | None = None
    synthetic: bool | None = None


@dataclass(frozen=True)
class ArchMap:
    """Everything that differs between Hugging Face's and GGUF's account of one architecture."""

    arch: str  # `general.architecture`
    model_types: tuple[str, ...]  # config.json's `model_type`, those of the text parts included
    architectures: tuple[str, ...]  # the Hugging Face classes that it covers; the first is written
    metadata: Callable[[Config], dict[str, Any]]  # GGUF keys of a config; raises CheckpointError
    rules: Callable[[Metadata], list[TensorRule]]  # every tensor such a model has
    example: Callable[[Sizes], dict[str, Any]]  # config.json of a synthetic model in which every feature matters
    config: Callable[[Metadata], dict[str, Any]] | None = None  # a config.json of GGUF keys that transformers loads
    transformers: bool = True  # transformers' AutoModelForCausalLM has the model: it is held against it
    otherwise: str = ""  # how else transformers bears witness, where it has no such model for text alone
    ignored: tuple[str, ...] = field(default=())  # prefixes of Hugging Face tensors left alone (vision, audio)
    covers: Callable[[Config], bool] | None = (
        None  # where several maps have a model type: whether a config is this one's
    )
