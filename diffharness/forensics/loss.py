"""Loss on logits: is it more than the types explain, and does it grow with the position? Numbers in, judgement out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffharness.records.grade import ControlRow, KlStatistics, PositionBucket
from diffharness.settings import Floors


@dataclass(frozen=True)
class KlLimits:
    """What mean and median KL from the checkpoint may be, by a control's."""

    mean: float
    median: float

    @classmethod
    def of(cls, mean: float, median: float, floors: Floors) -> KlLimits:
        """From the control's own mean and median."""
        factor, floor = floors["artifact.kl_factor"], floors["artifact.kl_floor"]
        return cls(factor * mean + floor, factor * median + floor)

    def passed_by(self, mean: float, median: float) -> bool:
        """Whether both are above their limits, or no numbers.

        A mean alone can be one position, or one token of a mixture of experts that was routed otherwise.
        """
        return not (mean <= self.mean or median <= self.median)


def beyond_control(own: KlStatistics, control: KlStatistics, floors: Floors) -> ControlRow:
    """Whether more was lost than the types explain, by mean and median KL."""
    limits = KlLimits.of(control.kl.value, control.kl_quantiles["50%"], floors)
    return ControlRow(
        statistics=control,
        kl_ratio=own.kl.value / control.kl.value if control.kl.value > 0 else None,
        kl_limit=limits.mean,
        median_limit=limits.median,
        beyond=limits.passed_by(own.kl.value, own.kl_quantiles["50%"]),
    )


def growth(curve: Sequence[PositionBucket], factor: float, floor: float) -> str | None:
    """The first position from which on mean KL is, in every bucket, over `factor` times that of those before.

    None if there is no such position. The first token is left out: it sees nothing but itself.
    """
    known = [(bucket, bucket.kl) for bucket in curve if bucket.start > 0 and bucket.kl is not None]
    for i in range(1, len(known)):
        before, after = _mean_kl(known[:i]), _mean_kl(known[i:])
        if min(kl for _, kl in known[i:]) > factor * before + floor:
            return f"mean KL is {before:.1e} below position {known[i][0].start} and {after:.1e} from there on"
    return None


def _mean_kl(part: Sequence[tuple[PositionBucket, float]]) -> float:
    return sum(bucket.n * kl for bucket, kl in part) / sum(bucket.n for bucket, _ in part)
