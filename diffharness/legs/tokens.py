"""The tokens leg: do the checkpoint's tokenizer and the artifact's vocabulary in the engine give the same ids?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffharness.records import Finding, TokenDifference, TokensLeg
from diffharness.token_difference import first_difference

Piece = Callable[[int], str]
"""An id's text in one of the two vocabularies."""


@dataclass(frozen=True)
class TokensOutcome:
    leg: TokensLeg
    findings: list[Finding]


def not_run(reason: str) -> TokensOutcome:
    """The leg where one of the two tokenizers, or the text, is missing."""
    return TokensOutcome(TokensLeg(reason=reason), [])


def compare(
    checkpoint_ids: Sequence[int],
    artifact_ids: Sequence[int],
    *,
    checkpoint_piece: Piece | None = None,
    artifact_piece: Piece | None = None,
) -> TokensOutcome:
    """Both sides' ids of one text, made under the same rule about BOS.

    The pieces are each side's own: one id may stand for different texts in the two vocabularies.
    """
    if not len(checkpoint_ids) and not len(artifact_ids):
        return not_run("the text has no tokens")
    shared = min(len(checkpoint_ids), len(artifact_ids))
    found = first_difference(checkpoint_ids, artifact_ids, checkpoint_piece or (lambda _: ""))
    if found is None:
        return TokensOutcome(TokensLeg(status="pass", compared=shared), [])
    first = TokenDifference(
        position=found.position,
        checkpoint_id=found.id_a,
        artifact_id=found.id_b,
        checkpoint_text=found.piece_a if checkpoint_piece else None,
    )
    if artifact_piece is not None and found.id_b is not None:
        first.artifact_text = artifact_piece(found.id_b)
    message = (
        f"the tokenizers disagree at position {found.position}: the checkpoint gives "
        f"{_show(first.checkpoint_id, first.checkpoint_text)}, "
        f"the artifact {_show(first.artifact_id, first.artifact_text)}"
    )
    leg = TokensLeg(status="fail", reason=message, compared=shared, first_difference=first)
    evidence = first.model_dump() | {"checkpoint_tokens": len(checkpoint_ids), "artifact_tokens": len(artifact_ids)}
    return TokensOutcome(leg, [Finding(kind="tokens", leg="tokens", message=message, evidence=evidence)])


def _show(token: int | None, text: str | None) -> str:
    if token is None:
        return "nothing more"
    return f"{token}" if text is None else f"{token} {text!r}"
