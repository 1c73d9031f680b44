"""What a forward has computed up to a layer, kept on disk, so that a later forward starts there.

A prefix holds the residual stream at layer boundaries and what layers hand on beside it (`State`). Boundary L is the
input of layer L; the last one is the head's. A forward that is given a prefix starts where the prefix ends and records
the boundaries that follow; `branch` makes one that shares everything before a layer. Starting from a prefix gives bit
for bit what the whole forward gives, as long as no weight before the boundary and no hyperparameter differs: that is
for the caller to know. Values keep the forward's own dtype.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from diffharness.errors import OutputError
from diffharness.reference.model import State
from diffharness.weights.output import check_space
from diffharness.weights.source import IntArray


class Prefix:
    """The boundaries of one forward over some chunks; empty until a forward has recorded on it.

    `folder` is where the file goes (the system's temporary folder by default); it has no name there and is gone with
    the last prefix that shares it. Not to be used by two forwards at once.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: _Spool | None = None
        self._chunks: bytes | None = None
        self._x: list[list[_Stored]] = []  # by boundary, by group of chunks
        self._handed: dict[tuple[int, str], tuple[int, _Stored]] = {}  # by group and name: boundary it was new at

    @property
    def end(self) -> int | None:
        """The last boundary that every group of chunks has reached; None if there is none."""
        return len(self._x) - 1 if self._x else None

    @property
    def n_bytes(self) -> int:
        """Bytes on disk that this prefix has added itself, without what it shares."""
        return self._file.size if self._file else 0

    def branch(self, boundary: int) -> Prefix:
        """A prefix that ends at `boundary` and shares what is kept up to there. ValueError if it is not that far."""
        if not 0 <= boundary < len(self._x):
            raise ValueError(f"a prefix that ends at {self.end} cannot be branched at boundary {boundary}")
        made = Prefix(self._folder)
        made._chunks = self._chunks
        made._x = self._x[: boundary + 1]
        made._handed = {key: (at, value) for key, (at, value) in self._handed.items() if at <= boundary}
        return made

    # -- for the runner ------------------------------------------------------------------------------

    def claim(self, chunks: Sequence[IntArray], dtype: torch.dtype) -> None:
        """Note what is run; ValueError if what is kept came from other chunks or another dtype."""
        digest = hashlib.sha256(repr((dtype, [len(chunk) for chunk in chunks])).encode())
        for chunk in chunks:
            digest.update(np.ascontiguousarray(chunk, dtype=np.int64).tobytes())
        if self._chunks is not None and self._chunks != digest.digest():
            raise ValueError("a prefix is of use for the chunks and the dtype that it was recorded with")
        self._chunks = digest.digest()

    def record(self, states: Sequence[tuple[Tensor, State]]) -> None:
        """Keep the next boundary: each group's residual stream [chunks, tokens, n_embd] and state there."""
        self._file = self._file or _Spool(self._folder)
        boundary = len(self._x)
        for i, (_, state) in enumerate(states):
            for name, value in _handed_on(state).items():
                if (i, name) not in self._handed:
                    self._handed[i, name] = boundary, self._file.write(value)
        self._x.append([self._file.write(x) for x, _ in states])

    def recall(self, group: int, state: State, device: torch.device) -> Tensor:
        """The residual stream of a group at the end of the prefix; `state` gets what was handed on until there."""
        held = {name: value.read(device) for (i, name), (_, value) in self._handed.items() if i == group}
        _hand_on(state, held)
        return self._x[-1][group].read(device)


def _handed_on(state: State) -> dict[str, Tensor]:
    """The tensors that a state carries from layer to layer, by names that `_hand_on` understands."""
    found = {} if state.per_layer_inputs is None else {"per_layer_inputs": state.per_layer_inputs}
    for il, pair in state.shared_kv.items():
        found |= {f"{il} {part}": value for part, value in zip("kv", pair, strict=True)}
    return found


def _hand_on(state: State, held: Mapping[str, Tensor]) -> None:
    state.per_layer_inputs = held.get("per_layer_inputs")
    lenders = sorted({int(name.split()[0]) for name in held if name != "per_layer_inputs"})
    state.shared_kv = {il: (held[f"{il} k"], held[f"{il} v"]) for il in lenders}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a spool; keeps the file open."""

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, device: torch.device) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)  # aligned as any tensor of a forward is
        view, at = made.numpy().reshape(-1).view(np.uint8).data, self.offset
        while view:
            done = os.preadv(self.file.fileno(), [view], at)
            if done == 0:
                raise OutputError("the file of kept activations is shorter than it was", hint="check the disk")
            view, at = view[done:], at + done
        return made.to(device)


class _Spool:
    """A nameless file that tensors are appended to."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (its last reader closes it)
        except OSError as error:
            raise self._failed(error) from error
        self.size = 0

    def write(self, value: Tensor) -> _Stored:
        array = value.detach().cpu().contiguous().numpy()
        check_space(self.folder, array.nbytes)
        data, offset = array.reshape(-1).view(np.uint8).data, self.size
        try:
            while data:
                done = os.pwrite(self._file.fileno(), data, self.size)
                data, self.size = data[done:], self.size + done
        except OSError as error:
            raise self._failed(error) from error
        return _Stored(self._file, offset, tuple(value.shape), value.dtype)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.folder}: activations cannot be kept: {error.strerror or error}",
            hint="free some space, or choose another place with TMPDIR",
        )
