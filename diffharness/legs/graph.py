"""The graph leg: does the strict engine compute the model? Same weights, same precision, so only the graph can differ.

Decided locally. Every reference layer was also fed the engine's own layer input, so that an error
shows in the tap that makes it and nowhere later; the end-to-end error stands beside it. The leg runs
once with the reference as defined and, where that leaves a floor, once more with ggml's arithmetic
conventions; a difference that only conventions explain passes, and names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diffharness.errors import InconclusiveError
from diffharness.legs._graph_pass import GraphShape, PassResult, judge_pass, judged_nmse
from diffharness.legs.compare import unmatched
from diffharness.records import Divergence, Finding, GraphLeg, Unmatched
from diffharness.taps import LAYER_TAPS, graph_order, layer_tap, split
from diffharness.words import are, counted, listed

__all__ = ["GraphOutcome", "GraphShape", "PassResult", "explaining", "first_divergence", "judge", "judge_pass"]

_NAMED = 5  # so many tensors are named in a message
_ATTENTION = frozenset(LAYER_TAPS[: LAYER_TAPS.index("ffn_in")])


@dataclass(frozen=True)
class GraphOutcome:
    leg: GraphLeg
    first_divergence: Divergence | None
    findings: list[Finding]


def judge(
    definition: PassResult,
    conventions: PassResult | None = None,
    *,
    engine_taps: Iterable[str],
    reference_taps: Iterable[str],
    unread: Sequence[str] = (),
    unknown_keys: Sequence[str] = (),
) -> GraphOutcome:
    """The leg from its one or two passes; InconclusiveError if the two sides share no tap.

    Where the sides differ and the reference left a tensor unread that may matter, nobody is accused: the engine may
    have read it. Keys that neither side knows are only told.
    """
    lone = unmatched(engine_taps, reference_taps)
    if definition.undecided:
        raise InconclusiveError(
            "not every layer could be compared locally, and the engine gave no logits to compare end to end",
            hint="check that the engine exposes layer_out and logits",
        )
    final = definition if conventions is None or definition.ok else conventions
    needed = explaining(definition, final) if final is conventions and final.ok else []
    leg = GraphLeg(
        status="pass" if final.ok else "fail",
        logits=final.logits,
        taps=final.rows,
        unmatched=lone,
        unread=list(unread),
        unknown_keys=list(unknown_keys),
        per_layer=final.per_layer,
        per_position=final.per_position,
        affected=final.affected,
        conventions=needed,
        as_defined=definition.summary(),
        with_conventions=None if conventions is None else conventions.summary(),
        router_ties=final.router_ties,
    )
    findings = _information(final, lone)
    if unread:
        findings.append(_unread_finding(unread))
    if unknown_keys:
        findings.append(_unknown_keys_finding(unknown_keys))
    if needed:
        leg.reason = f"passes with ggml's conventions: {', '.join(needed)}"
        findings.append(_conventions_finding(definition, final, needed))
    if final.ok:
        return GraphOutcome(leg, None, findings)
    divergence = first_divergence(final)
    leg.reason = _reason(final, divergence)
    mattering = [name for name in unread if _may_matter(name, len(final.per_layer))]
    if mattering:
        leg.status = "not_run"
        leg.reason = f"the reference does not read {listed(mattering, _NAMED)}, and differs: {leg.reason}"
        withheld = Finding(
            kind="inconclusive",
            leg="graph",
            message=leg.reason,
            evidence={"unread": mattering},
            next_step="remove the tensor, if the model has none, or ask for the variant to be supported",
        )
        return GraphOutcome(leg, None, [withheld, *findings])
    return GraphOutcome(leg, divergence, [_failure(final, divergence, leg.reason), *findings])


def first_divergence(result: PassResult) -> Divergence | None:
    """The first failing tap in graph order, and the first token of it that leaves its floor."""
    row = next(iter(result.failing), None)
    if row is None:
        return None
    token = row.first_token
    return Divergence(
        leg="graph",
        tap=row.tap,
        layer=split(row.tap)[0],
        token=token,
        position=None if token is None else int(result.positions[token]),
        nmse=row.nmse,
        nmse_local=row.nmse_local,
    )


def explaining(definition: PassResult, conventions: PassResult) -> list[str]:
    """Which of the conventions that were on explain what failed as defined.

    RoPE's angles show in the attention taps; the GELU table from `ffn_act` on, in layers whose
    attention is within its floors. What cannot be told apart is all named.
    """
    failing: dict[int | None, set[str]] = {}
    for row in definition.failing:
        layer, name = split(row.tap)
        failing.setdefault(layer, set()).add(name)
    attention = any(names & _ATTENTION for names in failing.values())
    feed_forward = any(names - _ATTENTION and not names & _ATTENTION for names in failing.values())
    named = [
        name
        for name in conventions.arithmetic
        if (attention and name.startswith("rope")) or (feed_forward and name.startswith("gelu"))
    ]
    return named or list(conventions.arithmetic)


# -- words --------------------------------------------------------------------------------------------


def _reason(result: PassResult, divergence: Divergence | None) -> str:
    if divergence is None:
        nmse = result.logits.nmse if result.logits else float("nan")
        return (
            f"logits differ end to end: NMSE {nmse:.1e} above the floor {result.logits_floor:.0e}, "
            "and not every layer could be compared locally"
        )
    row = result.failing[0]
    local, token_nmse = judged_nmse(row), row.worst_token_nmse or 0.0
    where = f" from token {divergence.token} on" if divergence.token else ""
    text = f"first divergence at {row.tap}{where}: local NMSE {local:.1e} (worst token {token_nmse:.1e})"
    text += f", floor {row.floor:.0e}" if row.floor is not None else ""
    return f"{text}; {result.affected}" if result.affected else text


def _failure(result: PassResult, divergence: Divergence | None, reason: str) -> Finding:
    evidence: dict[str, Any] = {
        "failing_taps": [row.tap for row in result.failing],
        "failing": len(result.failing),
        "judged": len(result.judged),
        "affected": result.affected,
        "arithmetic": list(result.arithmetic),
    }
    if divergence is not None:
        evidence |= divergence.model_dump() | {"floor": result.failing[0].floor}
        broken = result.non_finite.get(divergence.tap)
        if broken:
            evidence["non_finite"] = broken
    return Finding(
        kind="engine.graph",
        leg="graph",
        message=f"llama.cpp computes something else than the model: {reason}",
        evidence=evidence,
    )


def _conventions_finding(definition: PassResult, final: PassResult, needed: Sequence[str]) -> Finding:
    before, after = definition.summary(), final.summary()
    return Finding(
        kind=None,
        leg="graph",
        message=(
            f"as defined, {counted(len(definition.failing), 'tap leaves its', 'taps leave their')} floor "
            f"(worst {before.worst_tap}, local NMSE {_number(before.worst_local)}); with ggml's own arithmetic "
            f"({', '.join(needed)}) none does (worst {_number(after.worst_local)})"
        ),
        evidence={"as_defined": before.model_dump(), "with_conventions": after.model_dump()},
    )


def _may_matter(tensor: str, n_layer: int) -> bool:
    """Whether a forward of tokens may use it: not of another head or modality, nor of a layer behind the last."""
    layer, stem = split(tensor)
    if layer is not None:
        return layer < n_layer and not stem.endswith(".input_scale")
    return not stem.startswith(("cls.", "mm.", "v.", "a."))


def _unread_finding(unread: Sequence[str]) -> Finding:
    return Finding(
        kind=None,
        leg="graph",
        message=(
            f"{counted(len(unread), 'tensor')} of the artifact {are(len(unread))} not read by the reference: "
            f"{listed(unread, _NAMED)}"
        ),
        evidence={"unread": list(unread)},
    )


def _unknown_keys_finding(keys: Sequence[str]) -> Finding:
    return Finding(
        kind=None,
        leg="graph",
        message=(
            f"{counted(len(keys), 'metadata key')} of the artifact {are(len(keys))} known neither to the reference nor "
            f"to llama.cpp: {listed(keys, _NAMED)}"
        ),
        evidence={"unknown_keys": list(keys)},
    )


def _information(result: PassResult, lone: Unmatched) -> list[Finding]:
    findings: list[Finding] = []
    if result.router_ties:
        findings.append(
            Finding(
                kind=None,
                leg="graph",
                message=(
                    f"{result.router_ties} times a token took other experts on a near tie, the router's logits "
                    "agreeing within their floor; those tokens are left out of the later taps of their layer"
                ),
                evidence={"router_ties": result.router_ties},
            )
        )
    lonely = [("the engine", lone.engine), ("the reference", lone.reference)]
    for side, taps in lonely:
        if taps:
            names = sorted({split(tap)[1] for tap in taps}, key=lambda n: graph_order(layer_tap(0, n)))
            findings.append(
                Finding(
                    kind=None,
                    leg="graph",
                    message=f"{counted(len(taps), 'tap')} only {side} exposes, not compared: {', '.join(names)}",
                    evidence={"taps": taps},
                )
            )
    if result.ok and not result.logits_ok and result.logits is not None:
        findings.append(
            Finding(
                kind=None,
                leg="graph",
                message=(
                    f"every layer agrees locally, yet end to end the logits differ by NMSE {result.logits.nmse:.1e} "
                    f"(floor {result.logits_floor:.0e}): the model magnifies rounding errors"
                ),
                evidence={"nmse": result.logits.nmse, "floor": result.logits_floor},
            )
        )
    return findings


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1e}"
