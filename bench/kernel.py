"""What the kernel leg costs: every node replayed, over the native evaluation of the same tokens, and its memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.model import gemma3_270m, smollm2, token_ids
from bench.peak import mark, status
from bench.timing import Row, seconds
from diffharness.engine.runner import Engine
from diffharness.pipeline.replaying import Recording
from diffharness.recorded import RecordedNode
from diffharness.settings import EngineSettings, load_engine
from diffharness.weights.dequant import byte_size
from diffharness.weights.gguf_file import GgufFile, open_gguf

N_TOKENS, N_SINGLE = 128, 2
ROUNDS = 3


def kernel_leg() -> list[Row]:
    """Speed and memory for each of the two models, in processes of their own."""
    return [row for model in (smollm2(), gemma3_270m()) for row in _rows(model)]


def _rows(model: Path) -> list[Row]:
    command = [sys.executable, "-m", "bench.kernel", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout)
    detail = f"{found['leg']:.2f} s against {found['native']:.2f} s, loading left out of the native evaluation only"
    held = f"{found['peak'] / 1e6:.0f} MB at the most, {found['largest'] / 1e6:.0f} MB of the largest node"
    return [
        Row(f"kernel leg / native evaluation, {N_TOKENS} tokens, {model.name}", found["ratio"], 10.0, detail),
        Row(f"kernel leg peak memory / largest node, {model.name}", found["peak"] / found["largest"], None, held),
    ]


def measure(artifact: GgufFile, native: EngineSettings) -> dict[str, float]:
    """Seconds as medians of pairs; bytes that the leg adds to what is resident, and those of the largest node."""
    ids = token_ids(artifact.vocab_size, N_TOKENS + N_SINGLE)
    recording = Recording(artifact, ids.tolist(), native, N_TOKENS, N_SINGLE)
    before = mark()
    outcome = recording.replayed()
    peak = status("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "capture"
        pairs = [
            (
                seconds(recording.replayed),
                Engine(native).capture(artifact.paths[0], [ids[:N_TOKENS]], out, taps=()).eval_s,
            )
            for _ in range(ROUNDS)
        ]
    leg, alone = (statistics.median(side) for side in zip(*pairs, strict=True))
    largest = max(_n_bytes(each.node) for each in outcome.replayed)
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "leg": leg,
        "native": alone,
        "peak": peak,
        "largest": largest,
    }


def _n_bytes(node: RecordedNode) -> int:
    """Of the output and the sources, each as it is stored."""
    return sum(byte_size(value.type, value.shape) for value in (node.out, *node.sources) if value is not None)


def main() -> None:
    with open_gguf(sys.argv[1]) as artifact:
        print(json.dumps(measure(artifact, load_engine("native"))))


if __name__ == "__main__":
    main()
