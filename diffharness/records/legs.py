"""The legs' part of the run record: what each of the five questions was answered by.

Tokens are rows of the flattened fixture: chunk after chunk, counted from 0.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Plain, PlainDict
from diffharness.records.noise import NoiseReport

LegName = Literal["graph", "kernel", "settings", "artifact", "tokens"]
Status = Literal["pass", "fail", "not_run"]
LEG_NAMES: tuple[LegName, ...] = ("tokens", "graph", "kernel", "settings", "artifact")


class LogitStats(Part):
    """Logits of one side against the other's, over the scored positions; KL in nats, the reference side first."""

    nmse: Number
    kl_mean: Number
    kl_p99: Number
    kl_max: Number
    top1: Number = Field(description="share of positions whose most likely token is the same, 0 to 1")
    n: int = Field(default=0, description="positions compared")


class TapRow(Part):
    """One tap, compared over every token. NMSE = sum (a-b)^2 / sum b^2 with b the reference."""

    tap: str
    nmse: Number | None = Field(description="end to end: the reference ran on its own layer inputs")
    nmse_local: Number | None = Field(default=None, description="the reference layer was fed the engine's layer input")
    cos: Number | None = None
    max_abs: Number | None = None
    worst_token: int | None = Field(default=None, description="the token with the largest (local) NMSE")
    worst_token_nmse: Number | None = None
    floor: Number | None = Field(default=None, description="what nmse_local may be at most")
    ok: bool | None = None
    first_token: int | None = Field(default=None, description="the first token above its floor")
    left_out: int = Field(default=0, description="tokens left out: a near tie went the other way")
    nmse_control: Number | None = Field(default=None, description="artifact leg: the same for the control")


class Unmatched(Part):
    """Taps that only one side exposed."""

    engine: list[str] = []
    reference: list[str] = []


class LayerRow(Part):
    """The worst local tap of one layer."""

    layer: int
    kind: str = Field(description="`global`, `sliding`, ... as the architecture calls it")
    nmse_local: Number
    tap: str | None
    ok: bool


class PositionRow(Part):
    """The worst local NMSE of any tap over the tokens at positions start .. stop - 1 of their chunks."""

    start: int
    stop: int
    nmse_local: Number
    tap: str | None = None
    kl_mean: Number | None = Field(default=None, description="of the scored positions in this range")
    ok: bool


class GraphPass(Part):
    """The graph leg's outcome under one arithmetic of the reference."""

    arithmetic: list[str] = Field(default=[], description="ggml conventions that were on; empty: as defined")
    ok: bool
    logits: LogitStats | None = None
    worst_local: Number | None = None
    worst_tap: str | None = None
    failing: list[str] = Field(default=[], description="taps above their local floor, in graph order")


class Leg(Part):
    """One question. `reason` says why a leg did not run, or what else the reader must know."""

    status: Status = "not_run"
    reason: str | None = None
    logits: LogitStats | None = None
    taps: list[TapRow] = []


class StrictWay(Part):
    """How the strict engine got the artifact as F32: in one file, or in slices of its layers one after another."""

    way: Literal["whole", "slices"]
    reason: str = Field(description="why this way")
    slices: int | None = None
    layers: int | None = Field(default=None, description="of the longest slice")
    heads: int | None = Field(default=None, description="parts of the vocabulary whose logits were made separately")


class GraphLeg(Leg):
    """Strict engine against the reference on the same weights: only the graph can differ."""

    strict: StrictWay | None = Field(default=None, description="how the F32 model was run; null: it was not")
    unmatched: Unmatched = Unmatched()
    unread: list[str] = Field(default=[], description="tensors of the artifact that the reference never asked for")
    unknown_keys: list[str] = Field(
        default=[], description="metadata keys of the artifact's architecture that neither reference nor engine knows"
    )
    per_layer: list[LayerRow] = []
    per_position: list[PositionRow] = []
    affected: str | None = Field(default=None, description="which layers and positions a failure touches")
    conventions: list[str] = Field(default=[], description="ggml conventions without which the leg would not pass")
    as_defined: GraphPass | None = None
    with_conventions: GraphPass | None = None
    router_ties: int = Field(default=0, description="tokens times layers whose expert choice flipped on a near tie")


class NodeRow(Part):
    """One graph node, recomputed from the inputs that the engine gave it."""

    node: str
    op: str
    type: str = Field(description="of the weight, or of the first float source that is not F32")
    nmse: Number
    path: str = Field(default="batch", description="`batch` or `single`: tokens evaluated together, or one alone")
    occurrence: int = Field(default=0, description="nodes of this name and op before it in the graph")
    layer: int | None = None
    tensor: str | None = Field(default=None, description="the weight of the file among the sources")
    shape: list[int] = Field(default=[], description="of the output, slowest axis first")
    worst_row: int | None = Field(default=None, description="of the output's rows, slowest axis first")
    worst_row_nmse: Number | None = None
    max_abs: Number | None = None
    floor: Number | None = Field(default=None, description="what nmse may be at most")
    row_floor: Number | None = Field(default=None, description="what worst_row_nmse may be at most")
    ok: bool | None = None
    note: str | None = None


class OpRow(Part):
    """All nodes of one op, type and path."""

    op: str
    type: str
    path: str
    count: int
    failing: int = 0
    nmse: Number = Field(description="of the worst node")
    worst_row_nmse: Number
    floor: Number
    node: str = Field(description="the worst node")


class WithoutReplay(Part):
    """Nodes that were not compared, since no replay knows their op, or this variant of it."""

    op: str
    count: int
    reason: str | None = None


class KernelLeg(Leg):
    """Every node of the native graph against its replay. `logits` holds native against strict, as numbers only."""

    nodes_replayed: int = Field(default=0, description="nodes compared, those that only change the view included")
    nodes_total: int = Field(default=0, description="nodes of all evaluations")
    nodes_not_computed: int = Field(default=0, description="in the graph, but not needed, or without values")
    n_batch: int = Field(default=0, description="tokens evaluated together")
    n_single: int = Field(default=0, description="tokens evaluated alone, after them")
    ops: list[OpRow] = []
    without: list[WithoutReplay] = []
    failing: list[NodeRow] = Field(default=[], description="nodes above their floor, in graph order; the first ones")
    worst: list[NodeRow] = Field(default=[], description="the nodes nearest to their floors, or furthest above")
    changed: list[str] = Field(default=[], description="where evaluations of one shape had other nodes")
    noise: NoiseReport | None = Field(default=None, description="the native run's error, rounding told from faults")


class SettingsPair(Part):
    """The same engine twice, under settings that must not matter."""

    a: str
    b: str
    ok: bool
    logits: LogitStats | None = None
    nmse: Number
    floor: Number
    first_tap: str | None = None
    first_token: int | None = None
    token_nmse: Number | None = Field(default=None, description="of the logits at first_token")
    token_floor: Number | None = Field(default=None, description="what that may be at most")
    note: str | None = Field(default=None, description="which of the two is further from the strict engine")


class SettingsLeg(Leg):
    """The engine against itself."""

    pairs: list[SettingsPair] = []


class TensorRow(Part):
    """One tensor of the artifact against the checkpoint's; relative errors are NMSE over the whole tensor."""

    name: str
    type: str
    layer: int | None = None
    klass: str = Field(description="the name without its layer, such as `attn_q.weight`")
    error: Number = Field(description="artifact against checkpoint")
    control: Number | None = Field(default=None, description="the checkpoint's own tensor quantized to the same type")
    limit: Number = Field(description="what `error` may be at most")
    cos: Number | None = None
    non_finite: int = 0
    damaged: bool = False


class MetadataRow(Part):
    """One key on which artifact and checkpoint differ."""

    key: str
    artifact: Plain = None
    checkpoint: Plain = None
    used: bool = Field(description="the forward reads this key, or texts get other tokens by it")
    note: str | None = Field(default=None, description="what reads the key, where it is not the forward")
    repaired_ppl: Number | None = Field(default=None, description="the artifact's perplexity with the other value")


class PatternRow(Part):
    """What damaged tensors have in common, or what became of them."""

    kind: str = Field(description="a short name, such as `periodic` or `permuted_rows`")
    message: str = Field(description="one sentence for humans")
    tensors: list[str] = Field(default=[], description="the artifact's tensors that it is about")
    evidence: PlainDict = {}


class ArtifactLeg(Leg):
    """Reference on the artifact against reference on the checkpoint, and tensor by tensor."""

    control: LogitStats | None = Field(default=None, description="the same for a fresh quantization to the same types")
    tensors: list[TensorRow] = []
    metadata: list[MetadataRow] = []
    missing: list[str] = Field(default=[], description="tensors that only the checkpoint has")
    extra: list[str] = Field(default=[], description="tensors that only the artifact has")
    pattern: str | None = Field(default=None, description="which layers and classes are damaged")
    patterns: list[PatternRow] = Field(default=[], description="what damaged tensors have in common")


class TokenDifference(Part):
    """Where two tokenizations of one text part; an id is null where that side has ended."""

    position: int
    checkpoint_id: int | None = None
    artifact_id: int | None = None
    checkpoint_text: str | None = None
    artifact_text: str | None = None


class TokensLeg(Leg):
    """The checkpoint's tokenizer against the artifact's vocabulary in the engine, on the fixture's text."""

    compared: int = 0
    first_difference: TokenDifference | None = None


class Legs(Part):
    graph: GraphLeg = GraphLeg()
    kernel: KernelLeg = KernelLeg()
    settings: SettingsLeg = SettingsLeg()
    artifact: ArtifactLeg = ArtifactLeg()
    tokens: TokensLeg = TokensLeg()

    def get(self, name: LegName) -> Leg:
        leg: Leg = getattr(self, name)
        return leg
