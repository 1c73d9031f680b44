"""The run record's part on noise: what honest kernels would do to this file on these tokens, and what was done."""

from __future__ import annotations

from pydantic import Field

from diffharness.records.base import Number, Part


class DriftStats(Part):
    """How far one side's logits are from the reference's, over the scored positions. KL(reference || side) in nats."""

    kl_mean: Number
    kl_error: Number | None = Field(default=None, description="standard error of the mean; neighbours count as alike")
    kl_median: Number
    kl_p99: Number
    top1: Number = Field(description="share of positions whose most likely token is the same, 0 to 1")
    flips: int = Field(description="positions whose most likely token is another one")
    flips_weight: Number = Field(description="sum over them of the reference's lead of its token, as a probability")
    worst_flip: Number = Field(description="the largest of these leads, 0 to 1; 0 without flips")


class DriftPosition(Part):
    """Mean KL over the scored positions start .. stop - 1 of their chunks."""

    start: int
    stop: int
    measured: Number
    expected: Number


class Drift(Part):
    """The logits of the native engine and of the reference that rounds as it does, against the reference as defined."""

    n: int = Field(description="scored positions")
    measured: DriftStats
    expected: DriftStats
    flips_expected: Number | None = Field(
        default=None, description="number of flips to expect, by the margins and how far the simulation moves them"
    )
    ratio: Number | None = Field(default=None, description="measured mean KL over the expected and noise.kl_floor")
    low: Number | None = Field(default=None, description="95 % interval of the ratio")
    high: Number | None = None
    limit: Number = Field(description="what `low` may be at most")
    positions: list[DriftPosition] = []
    ok: bool | None = Field(default=None, description="null where nothing can be told")


class NativeLayer(Part):
    """One layer of the native run: what it adds itself, and what it was handed. NMSE against the reference.

    Local: every step fed the engine's own values, of the worst tap. Inherited: the layer's output, end to end.
    """

    layer: int | None = Field(description="null for what stands before and after the layers")
    kind: str = Field(description="as the architecture calls the layer; `embedding`, `head`")
    nmse_local: Number = Field(description="against the reference that rounds as the engine does")
    tap: str | None = Field(description="the worst tap")
    nmse_unsimulated: Number | None = Field(default=None, description="local against the reference as defined")
    nmse_inherited: Number | None = Field(default=None, description="engine against the reference as defined")
    nmse_expected: Number | None = Field(default=None, description="inherited, of the reference that rounds")
    floor: Number | None = Field(default=None, description="of the worst tap")
    ok: bool
    token: int | None = Field(default=None, description="the first token above its floor")


class RouterFlip(Part):
    """A token that took another expert than the reference's."""

    layer: int
    token: int
    dropped: int = Field(description="the expert that the reference takes")
    taken: int = Field(description="the engine's instead")
    margin: Number = Field(description="the reference's probability of the first less that of the second")


class RouterFlips(Part):
    """Choices of experts end to end, apart from errors that change no choice; `token` times layer is one decision."""

    decisions: int
    flipped: int = Field(description="by the engine, against the reference as defined")
    expected: int = Field(description="by the reference that rounds as the engine does")
    worst: list[RouterFlip] = Field(default=[], description="the flips over the largest margins")
    tokens: int = Field(description="tokens with a flip in any layer")
    kl_flipped: Number | None = Field(default=None, description="mean KL of these tokens")
    kl_others: Number | None = Field(default=None, description="mean KL of the others: continuous error alone")


class NonFiniteTap(Part):
    """Where the native run's first value that is not a finite number stands, in order of computation."""

    tap: str
    layer: int | None
    token: int = Field(description="the first of the tap")
    count: int = Field(description="such values in the tap")


class LargeTap(Part):
    """A tap with values near what float16 holds."""

    tap: str
    layer: int | None
    token: int
    largest: Number = Field(description="largest magnitude")
    share: Number = Field(description="of float16's largest number, 65504")


class NoiseReport(Part):
    """What of the native run's error is rounding that honest kernels do too, and what is not."""

    reason: str | None = Field(default=None, description="why nothing was simulated")
    simulated: list[str] = Field(default=[], description="arithmetic of the reference that rounds as the engine does")
    drift: Drift | None = None
    tokens: int = Field(default=0, description="tokens of the local comparison, from the fixture's row `first_row` on")
    first_row: int = 0
    layers: list[NativeLayer] = []
    unmatched: list[str] = Field(default=[], description="taps that the native engine does not expose")
    router: RouterFlips | None = None
    non_finite: NonFiniteTap | None = None
    large: list[LargeTap] = Field(default=[], description="the largest first")
