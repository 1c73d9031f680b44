"""`python -m bench.kld_against_llama_perplexity BINARY [GGUF ...]`: our KL statistics beside llama-perplexity's.

SmolLM2-135M-Instruct's weights are written as F32, which is the base, and requantized (or the files given are taken).
llama-perplexity runs on the shipped English text; our statistics are made on the same ids twice: from the engine's own
logits of both files, which leaves only the definitions and the 16-bit storage of the base to differ, and from the
reference's, which adds the engine's arithmetic. For the first, the base's logits are also taken through the same 16
bits and cut-offs, so that what is left is float32 summation. BINARY's folder must hold the libraries
that it was built with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.model import smollm2
from diffharness import kld
from diffharness.captures import Capture
from diffharness.engine.runner import Engine
from diffharness.fixture import Fixture, from_text, read_text, text_path
from diffharness.metrics import Float64Array, FloatArray
from diffharness.pipeline import logit_series
from diffharness.pipeline.logit_series import LOGITS, Places
from diffharness.pipeline.reference_runs import Precision
from diffharness.records.grade import KlStatistics
from diffharness.report.grade_statistics import statistics_rows
from diffharness.settings import load_engine
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf

CHUNK, N_CHUNKS = 512, 6
FTYPES = ("Q8_0", "Q4_K_M", "Q2_K")
_NUMBER = re.compile(r"(?P<name>[^:]+?)\s*:\s*(?P<value>-?[\d.]+)%?\s*(?:±\s*(?P<error>[\d.]+))?")


def printed(text: str) -> dict[str, tuple[float, float | None]]:
    """llama-perplexity's statistics by name: number and error."""
    found = {}
    for line in text[text.index("====== Perplexity statistics") :].splitlines():
        match = _NUMBER.match(line)
        if match is not None:
            error = match["error"]
            found[" ".join(match["name"].split()).replace(".0%", "%")] = (
                float(match["value"]),
                None if error is None else float(error),
            )
    return found


def ours(stats: KlStatistics) -> dict[str, tuple[float, float | None]]:
    """Ours by the same names."""
    found = {}
    for name, shown in statistics_rows(stats):
        value, _, error = shown.removesuffix(" %").partition(" ± ")
        found[name.removesuffix(", %")] = (float(value), float(error) if error else None)
    return found


def stored(logits: FloatArray) -> FloatArray:
    """Log probabilities [n, n_vocab] after the 16 bits of llama-perplexity's file; what it leaves out is -inf."""
    x = logits.astype(np.float64)
    largest = x.max(axis=1, keepdims=True)
    smallest = np.maximum(x.min(axis=1, keepdims=True), largest - 16)
    log_sum = largest + np.log(np.exp(x - largest).sum(axis=1, keepdims=True))
    scale = (largest - smallest) / 65535
    codes = np.where(x > smallest, np.rint((x - smallest) / scale), 0)
    values: FloatArray = codes * scale + (smallest - log_sum)
    return values


def through_storage(base: FloatArray, other: FloatArray, next_ids: np.ndarray) -> kld.Series:
    """`kld.series` with the base as llama-perplexity reads it back: not normalised again, below -16 left out."""
    parts = []
    for row in range(len(base)):
        log_p = stored(base[row : row + 1])
        log_q = kld.log_softmax(other[row : row + 1])
        terms = np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0.0)
        at = next_ids[row]
        nll, nll_base = -log_q[:, at], -log_p[:, at]
        same = log_p.argmax(axis=1) == other[row : row + 1].argmax(axis=1)
        kl: Float64Array = terms.sum(axis=1)
        parts.append(kld.Series(nll, nll_base, kl, np.exp(-nll) - np.exp(-nll_base), same))
    return kld.joined(parts)


def engine_logits(model: Path, fixture: Fixture, out: Path) -> Capture:
    """The native engine's logits. One chunk at a time, as llama-perplexity with -b as large as -c."""
    return Engine(load_engine("native")).capture(model, fixture.chunks(), out, taps=()).open()


def llama_perplexity(binary: Path, model: Path, text: Path, logits: Path, *, compare: bool) -> str:
    """The output of one run, which writes the base's logits or compares with them."""
    command = [str(binary), "-m", str(model), "-c", str(CHUNK), "-b", str(CHUNK), "--chunks", str(N_CHUNKS)]
    command += ["-f", str(text), "--kl-divergence-base", str(logits), *(["--kl-divergence"] if compare else [])]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [*command, "-t", threads],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(binary.parent)},
    )
    if done.returncode != 0:
        raise SystemExit(f"llama-perplexity ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def compare(binary: Path, given: list[Path], folder: Path) -> None:
    engine, text = Engine(load_engine("native")), text_path("english")
    base = folder / "f32.gguf"
    with open_gguf(smollm2()) as artifact:
        write_gguf(base, artifact, type_of=lambda info: "F32", kv_from=artifact)
    models = given or [engine.quantize(base, folder / f"{ftype}.gguf", ftype) for ftype in FTYPES]
    content = read_text(text)
    both = dict(zip([content, ""], engine.tokenize(base, [content, ""], parse_special=True), strict=True))
    fixture = from_text(content, both.__getitem__, name="english").first(CHUNK * N_CHUNKS)
    places = Places.of(fixture)
    precision = Precision()
    logits = folder / "base.bin"
    llama_perplexity(binary, base, text, logits, compare=False)
    by_engine = engine_logits(base, fixture, folder / "engine-base.safetensors")
    with open_gguf(base) as source:
        by_reference, _ = logit_series.of_base(source, fixture, places, precision, folder / "reference.safetensors")
    rows = places.rows[places.scored]
    next_ids = places.next_ids[places.scored]
    for model in models:
        theirs = printed(llama_perplexity(binary, model, text, logits, compare=True))
        capture = engine_logits(model, fixture, folder / "engine.safetensors")
        mine = logit_series.of_capture(capture, places, by_engine).at(places.scored)
        same_bits = through_storage(by_engine.read(LOGITS)[rows], capture.read(LOGITS)[rows], next_ids)
        with open_gguf(model) as source:
            reference = logit_series.of_reference(source, fixture, places, precision, by_reference).at(places.scored)
        columns = [theirs, *(ours(kld.statistics(series)) for series in (same_bits, mine, reference))]
        print(f"\n{model.name}: {N_CHUNKS} chunks of {CHUNK}")
        print(f"{'':32}{'llama-perplexity':>24}{'engine, 16 bits':>24}{'engine, float32':>24}{'reference':>24}")
        for name in ours(kld.statistics(mine)):
            cells = [column.get(name) for column in columns]
            print(f"{name:32}" + "".join(f"{_cell(cell):>24}" for cell in cells))
        gap = max(abs(columns[1][name][0] - theirs[name][0]) for name in columns[1] if name in theirs)
        print(f"largest difference of a number, 16 bits against llama-perplexity: {gap:.2g}")


def _cell(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "-"
    return f"{found[0]:g}" + ("" if found[1] is None else f" ± {found[1]:g}")


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(sys.argv[1]).resolve(), [Path(arg) for arg in sys.argv[2:]], Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
