"""The tables of `grade`: what stands in them, hostile names, and many artifacts."""

from __future__ import annotations

import numpy as np

from diffharness import kld
from diffharness.forensics.loss import beyond_control
from diffharness.paired import paired
from diffharness.records import ArtifactSubject, Finding, FixtureSubject
from diffharness.records.grade import BaseRow, Bf16Noise, EngineGrade, GradeRecord, GradeRow, PairRow, PositionBucket
from diffharness.report.document import to_markdown, to_text
from diffharness.report.grade import document
from tests.report.conftest import EVIL

FLOORS = {"artifact.kl_factor": 4.0, "artifact.kl_floor": 1e-6}


def stats(noise: float):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    base = rng.standard_normal((200, 20)).astype(np.float32)
    other = base + np.float32(noise) * rng.standard_normal(base.shape).astype(np.float32)
    return kld.statistics(kld.series(base, other, rng.integers(0, 20, 200)))


def row(label: str, noise: float = 0.1, **changes: object) -> GradeRow:
    found = stats(noise)
    buckets = [
        PositionBucket(start=0, stop=1, n=4, nll=6.5, kl=0.1),
        PositionBucket(start=1, stop=16, n=60, nll=2, kl=0.2),
    ]
    fields = {
        "label": label,
        "artifact": ArtifactSubject(path=f"/m/{label}", n_bytes=3 << 20),
        "bpw": 4.857,
        "ppl": found.ppl,
        "engine": EngineGrade(ppl=found.ppl, kl=found.kl, positions=buckets),
        "statistics": found,
        "positions": buckets,
    }
    return GradeRow.model_validate(fields | changes)


def record(*rows: GradeRow, **changes: object) -> GradeRecord:
    base = BaseRow(label="checkpoint", kind="checkpoint", ppl=stats(0).ppl, positions=list(rows[0].positions))
    fields = {
        "base": base,
        "rows": list(rows),
        "fixture": FixtureSubject(name="f", n_tokens=512, n_scored=255, chunk=512),
    }
    return GradeRecord.model_validate(fields | changes)


def pair(a: str, b: str, mean: float) -> PairRow:
    zero = np.zeros(512)
    noise = np.random.default_rng(1).standard_normal(512) / 10
    return PairRow(a=a, b=b, nll=paired(zero + mean + noise, zero, np.repeat([0, 1], 256)))


def test_the_tables() -> None:
    text = to_text(
        document(record(row("a.gguf"), row("b.gguf", 0.5), landmarks={"the window": 64}, repro="diffharness grade x"))
    )
    for told in ("2 artifacts graded.", "4.86", "3.0 MiB", "KL from checkpoint", "same top", "1-15", "the window is 64",
                 "a.gguf, llama.cpp", "Reproduce: diffharness grade x"):  # fmt: skip
        assert told in text, told
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "Maximum KLD" not in text and "Maximum KLD" in to_text(document(record(row("a.gguf")), full=True))


def test_the_control_decides_the_outcome() -> None:
    good = row("good.gguf", control=beyond_control(stats(0.1), stats(0.1), FLOORS))
    bad = row("bad.gguf", 2.0, control=beyond_control(stats(2.0), stats(0.1), FLOORS))
    assert good.control is not None and not good.control.beyond and bad.control is not None and bad.control.beyond
    assert document(record(good)).outcome == "pass"
    found = document(record(good, bad))
    assert found.outcome == "fail" and "bad.gguf" in found.summary and "good.gguf" not in found.summary
    assert document(record(row("x.gguf"))).outcome == ""


def test_errors_are_remarks() -> None:
    broken = GradeRow(label="z.gguf", artifact=ArtifactSubject(path="z.gguf"), error="not a GGUF", notes=["odd"])
    dead = row("dead.gguf", engine=EngineGrade(error="died with SIGILL"), control_error="no Q9_Z")
    text = to_text(document(record(dead, broken, findings=[Finding(kind=None, leg=None, message="tokens differ")])))
    for told in ("1 artifact graded, 1 not", "z.gguf: not graded: not a GGUF", "no result", "died with SIGILL",
                 "no Q9_Z", "z.gguf: note: odd", "tokens differ"):  # fmt: skip
        assert told in text, told


def test_the_better_one_stands_first() -> None:
    text = to_text(document(record(row("a"), row("b"), pairs=[pair("a", "b", 0.3)])))
    (line,) = [line for line in text.splitlines() if " yes" in line]
    assert line.split()[:2] == ["b", "a"] and "0.29592 ±" in line
    assert " no" in to_text(document(record(row("a"), row("b"), pairs=[pair("a", "b", 0.0)])))


def test_of_many_only_neighbours_are_paired() -> None:
    rows = [row(f"m{i}", 0.1 * (i + 1)) for i in range(6)]
    names = [one.label for one in rows]
    pairs = [pair(a, b, -0.1) for i, a in enumerate(names) for b in names[i + 1 :]]
    text = to_text(document(record(*rows, pairs=pairs)))
    assert "5 of 15 pairs" in text
    assert (
        sum(
            " ± " in line and "told" not in line and line.rstrip().endswith(("yes", "no")) for line in text.splitlines()
        )
        == 5
    )


def test_without_a_base_and_with_hostile_names() -> None:
    plain = row(EVIL, statistics=None, engine=None)
    for bucket in plain.positions:
        bucket.kl = None
    found = record(plain).model_copy(update={"base": None})
    for shown in (to_text(document(found)), to_markdown(document(found))):
        assert "\x1b" not in shown and "\u202e" not in shown
        assert "KL from" not in shown and "Mean NLL" in shown
    assert "<script>" not in to_markdown(document(found))


def test_the_noise_of_bf16() -> None:
    noise = Bf16Noise(label="checkpoint", nmse=4e-5, statistics=stats(0.01), limit=3e-4, supported=False)
    near, far = row("near.gguf", within_noise=True), row("far.gguf", within_noise=False)
    assert near.engine is not None
    near.engine.within_noise = True
    hidden = pair("near.gguf", "far.gguf", 0.3)
    hidden.nll = hidden.nll.model_copy(update={"within_noise": True, "told_apart": False})
    for shown in (to_text, to_markdown):
        text = shown(document(record(near, far, bf16=noise, pairs=[hidden]))).replace("\\", "")
        for told in ("first 200 tokens", "4.0e-05", "up to 3.0e-04 nats", "near.gguf in llama.cpp", "within noise",
                     "neither AVX512-BF16 nor AMX"):  # fmt: skip
            assert told in " ".join(text.split()), told
        assert "mean KL of near.gguf, near.gguf in llama.cpp" in " ".join(text.split())  # and of no other
    assert "oise" not in to_text(document(record(row("near.gguf"), row("far.gguf"))))
