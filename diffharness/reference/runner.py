"""Running the reference over a fixture: layer after layer, all chunks, weights read once and let go.

The forward walks the layers on the outside and the chunks on the inside, so that a layer's tensors are read once
however many chunks there are, and no more than one layer's are in memory. With `engine_inputs` every chunk goes
through twice in one batch: on the reference's own residual stream, and teacher-forced, on the engine's own input of
each layer; the second shows an error where it is made and not where it travels. With a `Prefix` a forward starts at
the layer where the prefix ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness import taps as tap_names
from diffharness.errors import FixtureError, SettingsError
from diffharness.reference import archs
from diffharness.reference.device import usable
from diffharness.reference.model import DEFINITION, Arithmetic, State, Watch, unheard
from diffharness.reference.prefix import Prefix
from diffharness.reference.rounding import RoundingWeights
from diffharness.reference.steps import Steps
from diffharness.reference.weights import SourceWeights
from diffharness.weights.source import IntArray, WeightSource

Layer = int | Literal["head"]
EngineInputs = Callable[[Layer], "NDArray[np.floating] | None"]
"""The engine's input of a layer (of layer 0: its embedding) or of the head, [all tokens, width]; None: not captured."""

OnTap = Callable[[str, Tensor, "Tensor | None", slice], None]
"""Called with a tap's full name, the own and the teacher-forced value [tokens, width], and the flattened rows.

Both values are the forward's own memory. Whoever writes into the teacher-forced one decides what follows it: written
over with the engine's value of every tap, each step of a layer starts from the engine's own numbers."""

OnAttention = Callable[[int, Tensor, "Tensor | None", Tensor, int, int], None]
"""Called with a layer, a block of its attention weights of the own and of the teacher-forced stream, both [chunks,
KV heads, group, queries, keys], and the rest of what `Watch` is told."""

_GROUP_TOKENS = 4096  # tokens (both streams) that go through a layer at once
_LOGITS_BYTES = 512 << 20  # logits made at once when nobody keeps them all

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class _Group:
    """Neighbouring chunks of one length, which go through a layer as one batch."""

    rows: slice  # of the flattened fixture
    shape: tuple[int, int]  # chunks, tokens of each
    tokens: Tensor  # [streams · chunks, tokens]
    state: State
    x: Tensor  # [streams · chunks, tokens, n_embd]; after the own chunks the teacher-forced ones


class Reference:
    """One model's forward on one source of weights.

    `model` replaces the model that the source's own metadata describe (a hypothesis, a repaired key). Raises
    ArtifactFileError for an unknown architecture or missing metadata, SettingsError for an unknown dtype or device.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        arithmetic: Arithmetic = DEFINITION,
        model: Steps | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise SettingsError(f"expected one of {', '.join(DTYPES)} as dtype, found {dtype!r}")
        self.source, self.arithmetic = source, arithmetic
        self.model = model if model is not None else archs.build(source.metadata)
        read = RoundingWeights if arithmetic.rounded_activations else SourceWeights
        self.weights = read(source, dtype=DTYPES[dtype], device=usable(device))

    @property
    def unread(self) -> list[str]:
        """Tensors of the source that no run of this reference has asked for, in the source's order.

        Without those that the model is known to leave alone.
        """
        names = [name for name in self.source.tensors if name not in self.weights.asked]
        return [name for name in names if not self.model.leaves_alone(name)]

    @torch.inference_mode()
    def run(
        self,
        chunks: Sequence[IntArray],
        *,
        engine_inputs: EngineInputs | None = None,
        on_tap: OnTap | None = None,
        taps: Iterable[str] | None = None,
        keep_logits: bool = True,
        on_attention: OnAttention | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor | None:
        """Evaluate every chunk from an empty context; logits [all tokens, vocab] of the reference's own stream.

        `taps` limits `on_tap` to these names without `blk.N.` (None: all). Values are views that are only good
        during the call. A layer that `engine_inputs` has nothing for runs on from the layer before, and its taps
        have no teacher-forced value. Without `keep_logits` nothing is returned and logits reach `on_tap` only, in
        pieces of bounded size, and the head is left out if `on_tap` does not want them either. `on_attention` sees
        every layer's attention weights, of both streams. A `prefix` that is not empty gives the forward up to its end,
        so that nothing before is read or told; an empty one is recorded from the start. Raises FixtureError for token
        ids outside of the vocabulary, ValueError for a prefix of other chunks or one together with `engine_inputs`.
        """
        if prefix is not None:
            if engine_inputs is not None:
                raise ValueError("a prefix keeps the reference's own stream only")
            prefix.claim(chunks, self.weights.dtype)
        try:
            listener = _Listener(on_tap, None if taps is None else frozenset(taps))
            return self._run(chunks, engine_inputs, listener, keep_logits, on_attention, prefix)
        finally:
            self.weights.close()

    def _run(
        self,
        chunks: Sequence[IntArray],
        engine_inputs: EngineInputs | None,
        listener: _Listener,
        keep_logits: bool,
        on_attention: OnAttention | None,
        prefix: Prefix | None,
    ) -> Tensor | None:
        heard = listener.wants_any() or on_attention is not None
        streams = 2 if engine_inputs is not None and heard else 1
        groups = self._groups(chunks, streams)
        start = prefix.end if prefix is not None else None
        if prefix is None or start is None:
            self._embed(groups, listener)
            _record(prefix, groups)
        else:
            for i, group in enumerate(groups):
                group.x = prefix.recall(i, group.state, self.weights.device)
        self.weights.keep = len(groups) > 1
        for il in range(start or 0, self.model.n_layer):
            forced = engine_inputs(il) if engine_inputs is not None and streams == 2 else None
            for group in groups:
                _force(group, forced)
                tap = listener.inside(group, il, local=forced is not None)
                group.state.watch = _watch(on_attention, il, group.shape[0], local=forced is not None)
                group.x = self.model.layer(self.weights, il, group.x, group.state, tap)
            self.weights.end_layer(il)
            _record(prefix, groups)
        self.weights.keep = False
        if not keep_logits and not listener.wants_any("output_norm", "logits"):
            return None
        forced = engine_inputs("head") if engine_inputs is not None and streams == 2 else None
        return self._head(groups, forced, listener, keep_logits)

    def _groups(self, chunks: Sequence[IntArray], streams: int) -> list[_Group]:
        """The chunks as batches, their ids checked, nothing computed yet."""
        n_vocab = self.weights.n_rows("token_embd.weight")
        groups: list[_Group] = []
        for first, batch in batches(chunks, streams):
            n_tokens = len(batch[0])
            ids = np.stack(batch).astype(np.int64)
            if ids.size == 0 or ids.min() < 0 or ids.max() >= n_vocab:
                raise FixtureError(
                    f"expected token ids from 0 to {n_vocab - 1}, found "
                    + (f"{ids.min()} to {ids.max()}" if ids.size else "an empty chunk"),
                    hint="the fixture was made with another tokenizer",
                )
            tokens = torch.from_numpy(ids).to(self.weights.device).repeat(streams, 1)
            state = State(torch.arange(n_tokens, device=self.weights.device), self.arithmetic)
            rows = slice(first, first + ids.size)
            groups.append(_Group(rows, (len(batch), n_tokens), tokens, state, torch.empty(0)))
        if not groups:
            raise FixtureError("expected at least one chunk of tokens, found none")
        return groups

    def _embed(self, groups: list[_Group], listener: _Listener) -> None:
        for group in groups:
            tap = listener.inside(group, None, local=len(group.tokens) > group.shape[0])
            group.x = self.model.embed(self.weights, group.tokens, group.state, tap)

    def _head(
        self, groups: list[_Group], forced: NDArray[np.floating] | None, listener: _Listener, keep: bool
    ) -> Tensor | None:
        # The head works on each token by itself: all chunks as one, its rows read once, if all logits are kept.
        model, weights, state = self.model, self.weights, groups[0].state
        own = torch.cat([group.x[: group.shape[0]].flatten(0, 1) for group in groups])
        for group in groups:
            group.x = torch.empty(0)
        n_tokens = own.shape[0]
        n_vocab = weights.n_rows("output.weight" if weights.has("output.weight") else "token_embd.weight")
        local_wanted = forced is not None
        step = max(64, _LOGITS_BYTES // (n_vocab * own.element_size()))
        if keep:
            step = n_tokens if not local_wanted else min(step, n_tokens)
        logits = own.new_empty(n_tokens, n_vocab) if keep and step < n_tokens else None
        for start in range(0, n_tokens, step):
            rows = slice(start, min(start + step, n_tokens))
            own_taps: dict[str, Tensor] = {}
            piece = model.head(weights, own[None, rows], state, own_taps.__setitem__)[0]
            if forced is None:
                for name, value in own_taps.items():
                    listener.tell(name, value[0], None, rows)
            else:
                x = torch.from_numpy(np.array(forced[rows])).to(own)
                model.head(weights, x[None], state, listener.both(own_taps, rows))
            if keep and logits is None:
                return piece
            if logits is not None:
                logits[rows] = piece
        return logits


class _Listener:
    """Cuts a batch's tap into own and teacher-forced values and passes on those that were asked for."""

    def __init__(self, on_tap: OnTap | None, wanted: frozenset[str] | None) -> None:
        self._on_tap, self._wanted = on_tap, wanted

    def inside(self, group: _Group, il: int | None, *, local: bool) -> Callable[[str, Tensor], None]:
        if self._on_tap is None:
            return unheard
        n_chunks = group.shape[0]

        def tap(name: str, value: Tensor) -> None:
            full = name if il is None else tap_names.layer_tap(il, name)
            if self._on_tap is None or (self._wanted is not None and name not in self._wanted):
                return
            own = value[:n_chunks].flatten(0, 1)
            self._on_tap(full, own, value[n_chunks:].flatten(0, 1) if local else None, group.rows)

        return tap

    def wants_any(self, *names: str) -> bool:
        """Whether anybody listens for one of these taps; for any at all, if none is named."""
        if self._on_tap is None:
            return False
        return self._wanted is None or not names or not self._wanted.isdisjoint(names)

    def both(self, own_taps: dict[str, Tensor], rows: slice) -> Callable[[str, Tensor], None]:
        """A tap of the teacher-forced stream that tells each value beside the own one, as it comes."""
        return lambda name, value: self.tell(name, own_taps[name][0], value[0], rows)

    def tell(self, name: str, own: Tensor, local: Tensor | None, rows: slice) -> None:
        if self._on_tap is not None and (self._wanted is None or name in self._wanted):
            self._on_tap(name, own, local, rows)


def _watch(on_attention: OnAttention | None, il: int, n_chunks: int, *, local: bool) -> Watch | None:
    """Cuts one layer's attention weights into the streams."""
    if on_attention is None:
        return None

    def watch(weights: Tensor, hidden: Tensor, first_query: int, first_key: int) -> None:
        forced = weights[n_chunks:] if local else None
        on_attention(il, weights[:n_chunks], forced, hidden, first_query, first_key)

    return watch


def batches(chunks: Sequence[IntArray], streams: int) -> Iterable[tuple[int, list[IntArray]]]:
    """Runs of neighbouring equally long chunks, each with its first row in the flattened fixture."""
    first, batch = 0, list[IntArray]()
    for chunk in chunks:
        full = batch and (len(batch) + 1) * len(chunk) * streams > _GROUP_TOKENS
        if batch and (full or len(chunk) != len(batch[0])):
            yield first, batch
            first, batch = first + sum(map(len, batch)), []
        batch.append(chunk)
    if batch:
        yield first, batch


def _record(prefix: Prefix | None, groups: Sequence[_Group]) -> None:
    if prefix is not None:
        prefix.record([(group.x, group.state) for group in groups])


def _force(group: _Group, forced: NDArray[np.floating] | None) -> None:
    """Put the engine's layer input in the place of the second stream's."""
    if forced is None:
        return
    n_chunks, n_tokens = group.shape
    values = torch.from_numpy(np.array(forced[group.rows])).to(group.x)
    group.x = torch.cat((group.x[:n_chunks], values.reshape(n_chunks, n_tokens, -1)))
