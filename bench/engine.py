"""What the capture of taps costs the engine's evaluation."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.model import smollm2, token_ids, write_float32
from bench.timing import Row
from diffharness.engine.runner import LOGITS_ONLY, RESIDUALS, Engine
from diffharness.settings import EngineSettings, load_engine
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import IntArray

ROUNDS = 3


@dataclass(frozen=True)
class Bare:
    """An engine and a model file; evaluated without and with capture."""

    settings: EngineSettings
    model: Path
    ids: IntArray
    taps: tuple[str, ...] | None  # that a run captures; None for all

    def eval_s(self, out: Path, *, captured: bool) -> float:
        """Seconds of evaluation alone, loading left out."""
        run = Engine(self.settings).capture(self.model, [self.ids], out, taps=self.taps if captured else LOGITS_ONLY)
        out.unlink()
        return run.eval_s


def capture() -> Iterator[Row]:
    """The native and the strict engine on SmolLM2, each with the taps that a run captures."""
    with tempfile.TemporaryDirectory() as folder, open_gguf(smollm2()) as artifact:
        scratch, ids = Path(folder), token_ids(artifact.vocab_size)
        plain = write_float32(artifact, scratch / "strict.gguf")
        for name, bare in {
            "native": Bare(load_engine("native"), artifact.paths[0], ids, tuple(RESIDUALS)),
            "strict": Bare(load_engine("strict"), plain, ids, None),
        }.items():
            pairs = [
                (bare.eval_s(scratch / "c", captured=True), bare.eval_s(scratch / "c", captured=False))
                for _ in range(ROUNDS)
            ]
            with_capture, without = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            detail = f"{with_capture:.2f} s with the taps captured that a run asks for, {without:.2f} s without"
            yield Row(f"{name} engine, capture on / off", ratio, 1.5, detail)
