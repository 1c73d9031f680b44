"""The reference's passes: against the strict engine, and on artifact, checkpoint and control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness.captures import Capture, CaptureWriter
from diffharness.fixture import Fixture
from diffharness.legs.compare import Choice, TapComparison
from diffharness.legs.graph import GraphShape, PassResult, judge_pass
from diffharness.metrics import compare_logits
from diffharness.reference.model import DEFINITION, GGML, Arithmetic
from diffharness.reference.runner import Layer, OnAttention, OnTap, Reference
from diffharness.reference.steps import Steps
from diffharness.taps import layer_tap, split
from diffharness.weights.source import IntArray, WeightSource

Logits = NDArray[np.floating[Any]]


class Forward(Protocol):
    """What makes logits of tokens; `Reference.run` says how."""

    def run(
        self,
        chunks: Sequence[IntArray],
        *,
        on_tap: OnTap | None = None,
        taps: Sequence[str] | None = None,
        keep_logits: bool = True,
    ) -> Tensor | None: ...


@dataclass(frozen=True)
class Precision:
    """How the reference computes."""

    dtype: str = "float32"
    device: str = "cpu"

    def forward(self, source: WeightSource) -> Forward:
        """Of these weights, for logits that are compared with the reference's own and no engine's."""
        return Reference(source, dtype=self.dtype, device=self.device)


@dataclass
class GraphRuns:
    """One or two judged passes of the reference against the strict engine."""

    definition: PassResult
    conventions: PassResult | None
    logits: Logits  # [n_tokens, n_vocab], as defined
    convention_logits: Logits | None  # the same with ggml's conventions
    taps: list[str]  # that the reference exposes
    unread: list[str]  # tensors of the source that the reference never asked for


@dataclass(frozen=True)
class GraphPass:
    """One pass of the reference against the strict engine."""

    result: PassResult
    logits: Logits  # [n_tokens, n_vocab]
    taps: list[str]  # that the reference exposes
    unread: list[str]  # tensors of the source that the reference never asked for


def layer_inputs(capture: Capture) -> Any:
    """A capture's input of each layer and of the head, as `Reference.run` asks for it.

    A layer that adds nothing may have no node in the engine's graph, and so no output.
    """
    outputs = [layer for layer, tap in map(split, capture.taps) if tap == "layer_out" and layer is not None]
    n_layer = 1 + max(outputs, default=-1)

    def of(layer: Layer) -> NDArray[np.floating[Any]] | None:
        if layer == "head":
            name = layer_tap(n_layer - 1, "layer_out")
        else:
            name = "token_embd" if layer == 0 else layer_tap(int(layer) - 1, "layer_out")
        return capture.read(name) if name in capture else None

    return of


def shape_of(model: Steps, fixture: Fixture, n_ubatch: int) -> GraphShape:
    """Layers by kind, and the positions at which something changes."""
    kinds = [model.layer_kind(il) for il in range(model.n_layer)]
    landmarks: dict[str, int] = {}
    windows = [w for w in np.atleast_1d(getattr(model, "window", None) or ()) if w is not None]
    longest = max(end - start for start, end in fixture.chunk_bounds())
    if windows and min(windows) < longest:
        landmarks["the window"] = int(min(windows))
    if n_ubatch < longest:
        landmarks["n_ubatch"] = n_ubatch
    positions = np.concatenate([np.arange(end - start) for start, end in fixture.chunk_bounds()])
    return GraphShape(kinds=kinds, positions=positions.astype(np.int64), landmarks=landmarks)


def against_engine(
    source: WeightSource,
    strict: Capture,
    fixture: Fixture,
    floors: Mapping[str, float],
    *,
    precision: Precision,
    n_ubatch: int,
) -> GraphRuns:
    """Pass 1 as the model is defined; pass 2 with ggml's conventions if something left its floor."""

    def one_pass(arithmetic: Arithmetic) -> GraphPass:
        return graph_pass(
            source, strict, fixture, floors, precision=precision, n_ubatch=n_ubatch, arithmetic=arithmetic
        )

    plain = one_pass(DEFINITION)
    other = None if plain.result.ok else one_pass(conventions_of(source))
    return GraphRuns(
        definition=plain.result,
        conventions=None if other is None else other.result,
        logits=plain.logits,
        convention_logits=None if other is None else other.logits,
        taps=plain.taps,
        unread=plain.unread,
    )


def conventions_of(source: WeightSource) -> Arithmetic:
    """ggml's conventions, without those that the model has no use for, which explain nothing."""
    model = Reference(source).model
    return replace(GGML, gelu_f16_table=model.uses_gelu or model.uses_erf, gelu_erf_as_tanh=model.uses_erf)


def graph_pass(
    source: WeightSource,
    strict: Capture,
    fixture: Fixture,
    floors: Mapping[str, float],
    *,
    precision: Precision,
    n_ubatch: int,
    arithmetic: Arithmetic,
    model: Steps | None = None,
) -> GraphPass:
    """One pass against the strict engine, judged; of another `model` where one is given."""
    reference = Reference(source, dtype=precision.dtype, device=precision.device, arithmetic=arithmetic, model=model)
    comparison = TapComparison(fixture.n_tokens, choice=choice_of(source))
    seen: dict[str, None] = {}

    def on_tap(tap: str, own: Tensor, local: Tensor | None, rows: slice) -> None:
        seen[tap] = None
        if tap in strict:
            engine = strict.read(tap)[rows]
            comparison.feed(tap, rows.start, engine, _array(own), None if local is None else _array(local))

    out = reference.run(fixture.chunks(), engine_inputs=layer_inputs(strict), on_tap=on_tap)
    assert out is not None, "run keeps logits unless told otherwise"
    logits = _array(out)
    compared = None
    if "logits" in strict:
        compared = compare_logits(logits, strict.read("logits"), fixture.scored_positions())
    shape = shape_of(reference.model, fixture, n_ubatch)
    result = judge_pass(comparison, shape, floors, arithmetic=arithmetic.conventions, logits=compared)
    return GraphPass(result, logits, list(seen), reference.unread)


def logits_of(
    source: WeightSource, fixture: Fixture, precision: Precision, arithmetic: Arithmetic = DEFINITION
) -> Logits:
    """Logits of one forward [n_tokens, n_vocab]."""
    reference = Reference(source, dtype=precision.dtype, device=precision.device, arithmetic=arithmetic)
    out = reference.run(fixture.chunks())
    assert out is not None, "run keeps logits unless told otherwise"
    return _array(out)


def captured(
    source: WeightSource,
    fixture: Fixture,
    precision: Precision,
    path: Path,
    *,
    taps: Iterable[str] | None = None,
    on_attention: OnAttention | None = None,
) -> Capture:
    """One forward with its taps and logits in a capture at `path`; `taps` limits them to these, without `blk.N.`."""
    reference = Reference(source, dtype=precision.dtype, device=precision.device)
    with CaptureWriter(path, fixture.n_tokens, {"source": source.label}) as writer:
        reference.run(
            fixture.chunks(),
            on_tap=lambda tap, own, _, rows: writer.write(tap, rows.start, _array(own)),
            taps=taps,
            keep_logits=False,
            on_attention=on_attention,
        )
        writer.finish()
    return Capture(path)


def against_capture(
    source: WeightSource,
    other: Capture,
    fixture: Fixture,
    precision: Precision,
    *,
    on_attention: OnAttention | None = None,
) -> tuple[Logits, TapComparison]:
    """One forward, its taps compared with `other` (below the line) where each layer is fed the other's input."""
    reference = Reference(source, dtype=precision.dtype, device=precision.device)
    comparison = TapComparison(fixture.n_tokens)

    def on_tap(tap: str, own: Tensor, local: Tensor | None, rows: slice) -> None:
        if tap in other and tap != "logits":
            # The comparison's first value is the one on trial: this source's, fed the other's input where it was.
            comparison.feed(tap, rows.start, _array(own if local is None else local), other.read(tap)[rows])

    out = reference.run(fixture.chunks(), engine_inputs=layer_inputs(other), on_tap=on_tap, on_attention=on_attention)
    assert out is not None, "run keeps logits unless told otherwise"
    return _array(out), comparison


def experts_used(source: WeightSource) -> int | None:
    """Experts of each token; None of a model without."""
    value = source.metadata.get(f"{source.arch}.expert_used_count")
    return int(value) if value else None


def choice_of(source: WeightSource) -> Choice | None:
    """How the model's layers choose experts; None of a model without."""
    if experts_used(source) is None:
        return None
    model = Reference(source).model

    @torch.inference_mode()
    def choose(layer: int, logits: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        name = f"blk.{layer}.exp_probs_b.bias"
        bias = torch.from_numpy(np.array(source.read(name))) if name in source.tensors else None
        _, experts = model.route(torch.from_numpy(np.array(logits, dtype=np.float32)), bias)
        return experts.numpy()

    return choose


def _array(value: Tensor) -> NDArray[np.floating[Any]]:
    return value.detach().cpu().numpy()
