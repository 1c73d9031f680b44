"""What the capture costs the engine, and what a whole run costs over the forwards that it cannot do without."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.model import N_TOKENS, smollm2, token_ids
from bench.timing import Row, seconds
from diffharness.engine.runner import Engine
from diffharness.reference.runner import Reference
from diffharness.settings import EngineSettings, load_engine
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.source import IntArray

ROUNDS = 3

# A run without the forms of the deeper commands that it carries.
BOUNDED_FORMS_OFF = ("--kernel-tokens", "0", "--grid", "none", "--no-explain", "--no-noise")


@dataclass(frozen=True)
class Bare:
    """An engine and a model file; evaluated without and with capture."""

    settings: EngineSettings
    model: Path
    ids: IntArray
    taps: tuple[str, ...] | None  # that a run captures; None for all

    def eval_s(self, out: Path, *, captured: bool) -> float:
        """Seconds of evaluation alone, loading left out."""
        run = Engine(self.settings).capture(self.model, [self.ids], out, taps=self.taps if captured else ())
        out.unlink()
        return run.eval_s


def engine_and_run() -> list[Row]:
    """All rows share the uncaptured evaluations, so they are measured together."""
    artifact_path = smollm2()
    with tempfile.TemporaryDirectory() as folder, open_gguf(artifact_path) as artifact:
        scratch = Path(folder)
        strict_path = scratch / "strict.gguf"
        write_gguf(strict_path, artifact, type_of=lambda info: "F32", kv_from=artifact)
        ids = token_ids(artifact.vocab_size)
        engines = {
            "native": Bare(load_engine("native"), artifact_path, ids, ("token_embd", "blk.*.layer_out")),
            "strict": Bare(load_engine("strict"), strict_path, ids, None),
        }
        rows, floor = [], 0.0
        for name, bare in engines.items():
            pairs = [
                (bare.eval_s(scratch / "c", captured=True), bare.eval_s(scratch / "c", captured=False))
                for _ in range(ROUNDS)
            ]
            with_capture, without = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            detail = f"{with_capture:.2f} s with the taps captured that a run asks for, {without:.2f} s without"
            rows.append(Row(f"{name} engine, capture on / off", ratio, 1.5, detail))
            floor += statistics.median(
                seconds(lambda b=bare: b.eval_s(scratch / "c", captured=False)) for _ in range(ROUNDS)
            )  # type: ignore[misc]

        reference = Reference(artifact)
        reference.run([ids])
        floor += statistics.median(seconds(lambda: reference.run([ids])) for _ in range(ROUNDS))
        forms: list[tuple[str, tuple[str, ...], float | None]] = [
            ("whole run, bounded forms off", BOUNDED_FORMS_OFF, 3.0),
            ("whole run by default", (), None),
        ]
        for name, options, limit in forms:
            whole = statistics.median(seconds(lambda o=options: run_once(artifact_path, o)) for _ in range(ROUNDS))  # type: ignore[misc]
            detail = f"{whole:.1f} s as a process; one native and one strict evaluation as processes and one reference "
            detail += f"forward in this one: {floor:.1f} s"
            rows.append(Row(f"{name} / (native + strict + reference)", whole / floor, limit, detail))
        return rows


def run_once(model: Path, options: Sequence[str]) -> None:
    """`diffharness run` as a user starts it; a verdict of 0 or 1 is a run."""
    command = [sys.executable, "-m", "diffharness", "run", str(model), "--tokens", str(N_TOKENS), "-q", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode > 1:
        raise SystemExit(f"diffharness run ended with {done.returncode}: {done.stderr}")
