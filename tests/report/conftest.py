"""Records to render: a plain one, and one in which everything is as long and as hostile as it can be."""

from __future__ import annotations

import pytest

from diffharness.records import (
    ArtifactLeg,
    ArtifactSubject,
    CheckpointSubject,
    Divergence,
    EngineSubject,
    Finding,
    FixtureSubject,
    GraphLeg,
    KernelLeg,
    LayerRow,
    Legs,
    LogitStats,
    MetadataRow,
    PositionRow,
    RunRecord,
    Score,
    Scores,
    SettingsLeg,
    Subject,
    TapRow,
    TensorRow,
    TokensLeg,
    Verdict,
)

EVIL = "x\n\n# y | z `tick` ``` <script>alert(1)</script> [red]markup[/red] \x1b[31m @someone **b** _i_ \u202e"


def stats(nmse: float = 4.1e-13) -> LogitStats:
    return LogitStats(nmse=nmse, kl_mean=5e-9, kl_p99=2e-8, kl_max=1e-7, top1=0.99609375, n=256)


def tap(name: str, local: float, ok: bool = True) -> TapRow:
    return TapRow(
        tap=name, nmse=local * 3, nmse_local=local, cos=0.9999999, max_abs=1e-3, worst_token=17, floor=1e-8, ok=ok
    )


@pytest.fixture
def plain() -> RunRecord:
    taps = [tap(f"blk.{il}.attn_q", 1e-12 * (il + 1)) for il in range(20)]
    return RunRecord(
        verdict=Verdict(
            primary="agree",
            all=["agree"],
            summary="everything that was compared agrees (graph).",
            next_step="diffharness run m",
        ),
        legs=Legs(
            graph=GraphLeg(status="pass", logits=stats(), taps=taps),
            kernel=KernelLeg(reason="node replay is not built yet", logits=stats(1.4e-4)),
        ),
        scores=Scores(
            reference={"artifact": Score(ppl=16.03125, nll=2.77)}, engine={"strict": Score(ppl=16.03124, nll=2.77)}
        ),
        findings=[Finding(kind=None, leg="graph", message="2 taps only the engine exposes")],
        subject=Subject(
            artifact=ArtifactSubject(path="m.gguf", arch="llama", types={"Q4_1": 210, "F32": 61}, n_params=134515008),
            fixture=FixtureSubject(name="english", n_tokens=512, n_scored=255, chunk=512),
            engine=EngineSubject(version="0.3.36", settings={"n_ubatch": 512, "flash_attn": "off"}),
        ),
        repro="diffharness run m.gguf --tokens 512",
    )


@pytest.fixture
def hostile() -> RunRecord:
    text = EVIL * 40
    leg = {"status": "fail", "reason": text, "logits": stats(float("inf"))}
    taps = [tap(f"blk.{il}.{EVIL}", float("nan") if il == 3 else 0.1 * il, ok=False) for il in range(100)]
    where = Divergence(leg="graph", tap=EVIL, layer=3, token=900, position=388, nmse=float("inf"), nmse_local=0.4)
    tensor = TensorRow(name=EVIL, type=EVIL, klass=EVIL, error=0.5, control=1e-3, limit=4e-3, cos=0.7, damaged=True)
    return RunRecord(
        verdict=Verdict(primary="engine.graph", all=["engine.graph", "tokens"], summary=text, next_step=text),
        first_divergence=where,
        legs=Legs(
            graph=GraphLeg(
                **leg,
                taps=taps,
                affected=text,
                per_layer=[LayerRow(layer=0, kind=EVIL, nmse_local=0.1, tap=EVIL, ok=False)],
                per_position=[PositionRow(start=0, stop=16, nmse_local=0.1, tap=EVIL, kl_mean=None, ok=True)],
            ),
            kernel=KernelLeg(**leg),
            settings=SettingsLeg(**leg),
            tokens=TokensLeg(**leg),
            artifact=ArtifactLeg(
                **leg,
                pattern=text,
                control=stats(),
                taps=[tap(EVIL, 0.2)],
                metadata=[MetadataRow(key=EVIL, artifact=text, checkpoint=[EVIL], used=True, repaired_ppl=4.8)],
                tensors=[tensor] * 300,
            ),
        ),
        scores=Scores(
            reference={
                "artifact": Score(ppl=float("inf"), nll=99),
                "checkpoint": Score(ppl=4.7, nll=1.5),
                EVIL: Score(ppl=1, nll=0),
            },
            engine={"native": Score(ppl=float("nan"), nll=1), "strict": Score(ppl=5, nll=1)},
        ),
        findings=[Finding(kind=kind, leg="graph", message=text) for kind in [None, "engine.graph", "tokens"] * 20],
        subject=Subject(
            artifact=ArtifactSubject(
                path=text, arch=EVIL, name=EVIL, types={f"{EVIL}{i}": i for i in range(30)}, n_bytes=1 << 40
            ),
            checkpoint=CheckpointSubject(path=text, model_type=EVIL, types={"BF16": 3}),
            fixture=FixtureSubject(name=text, n_tokens=1, n_scored=1, chunk=512, sha256="ab" * 32),
            engine=EngineSubject(
                version=EVIL, commit=EVIL, settings={EVIL: EVIL}, overrides=[EVIL] * 9, system_info=text
            ),
            machine={"cpu": EVIL, "nested": {"a": EVIL}},
        ),
        repro=text,
    )
