"""Models of true size, synthetic: `python -m bench.true_size 12b|26b [FILE] [--tokens N] [--run] [--keep]`. Linux only.

Writes a GGUF of Gemma 4's true widths (12B dense, or 26B-A4B with 128 experts) in Q4_K_M's mixture: random blocks whose
scales keep activations near one, about 7 and 15 GB, to FILE or a temporary folder. Then the reference grades random
tokens as `diffharness grade` does, and llama.cpp evaluates the same ones on as many threads; printed are the seconds of
each, their ratio, and the reference's peak of resident memory. With `--run` a whole `diffharness run` is made instead.
The file is deleted unless it was there before or `--keep` is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.inspect_12b import CONFIG, PERIOD
from bench.peak import mark, status
from diffharness.engine.runner import LOGITS_ONLY, Engine
from diffharness.fixture import Fixture, from_ids, save_fixture
from diffharness.machine import this_machine, usable_cores
from diffharness.pipeline import RunRequest, run
from diffharness.pipeline.logit_series import Places, of_reference
from diffharness.pipeline.reference_runs import Precision
from diffharness.settings import EngineSettings, load_engine, load_tolerances
from diffharness.taps import split
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from diffharness.weights.names import MAPS

Bytes = NDArray[np.uint8]

_EXPERTS = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
SIZES: Mapping[str, tuple[int, Mapping[str, Any]]] = {"12b": (48, {}), "26b": (30, _EXPERTS)}  # layers, config
_PIECE = 1 << 17  # blocks made at a time


# -- random blocks ------------------------------------------------------------------------------------


def _q4_k(blocks: Bytes, std: float) -> None:
    """d (scale q) - dmin m, scales and minima of 6 random bits: of deviation 258 d where dmin is 7.5 d."""
    _put_f16(blocks, 0, std / 258)
    _put_f16(blocks, 2, 7.5 * std / 258)


def _q6_k(blocks: Bytes, std: float) -> None:
    """d scale (q - 32), scales of 6 random bits with a sign."""
    blocks[:, 192:208] = (blocks[:, 192:208].view(np.int8) >> 2).view(np.uint8)
    _put_f16(blocks, 208, std / (18.5 * 18.5))


def _q5_0(blocks: Bytes, std: float) -> None:
    """d (q - 16)."""
    _put_f16(blocks, 0, std / 9.2)


def _put_f16(blocks: Bytes, at: int, value: float) -> None:
    blocks[:, at : at + 2] = np.array([value], dtype=np.float16).view(np.uint8)


KINDS: Mapping[str, tuple[int, int, Callable[[Bytes, float], None]]] = {  # values and bytes of a block, and its scales
    "Q4_K": (256, 144, _q4_k),
    "Q6_K": (256, 210, _q6_k),
    "Q5_0": (32, 22, _q5_0),
}


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Roughly Q4_K_M's choice; rows that no K type divides get Q5_0, as llama.cpp's own quantizer has it."""
    layer, klass = split(name)
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    if shape[-1] % 256:
        return "Q5_0"
    more = klass == "attn_v.weight" or (klass.startswith("ffn_down") and (layer or 0) % 2 == 0)
    return "Q6_K" if layer is None or more else "Q4_K"


def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Bytes]:
    """A tensor's bytes, random by its name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    kind = kind_of(name, shape)
    if kind == "F32":
        values = random.standard_normal(shape) if len(shape) > 1 else np.full(shape, _vector(name))
        yield values.astype(np.float32).reshape(-1).view(np.uint8)
        return
    n_values, n_bytes, scale = KINDS[kind]
    left = math.prod(shape) // n_values
    while left:
        n = min(left, _PIECE)
        blocks = np.frombuffer(random.bytes(n * n_bytes), dtype=np.uint8).reshape(n, n_bytes).copy()
        scale(blocks, shape[-1] ** -0.5)
        yield blocks.reshape(-1)
        left -= n


def _vector(name: str) -> float:
    """Scores are not scaled: norms of queries and keys keep them within a few units."""
    if "attn_q_norm" in name or "attn_k_norm" in name:
        return 0.35
    return 0.5 if "post_" in name else 1.0


def write(path: Path, size: str) -> None:
    """The model as GGUF, without a vocabulary."""
    n_layer, changes = SIZES[size]
    kinds = ["full_attention" if il % PERIOD == PERIOD - 1 else "sliding_attention" for il in range(n_layer)]
    config = {**CONFIG, **changes, "num_hidden_layers": n_layer, "layer_types": kinds}
    names = MAPS["gemma4"]
    metadata = {"general.architecture": "gemma4", **names.metadata(config)}
    metadata |= {"tokenizer.ggml.model": "no_vocab", "gemma4.vocab_size": config["vocab_size"]}
    wanted = ("layer_output_scale.weight", "ffn_gate_up_exps.weight", "ffn_down_exps.scale")
    tensors = []
    for rule in names.rules(metadata):
        if rule.values is not None:
            given = rule.values().astype(np.float32)
            tensors.append(RawTensor(rule.name, given.shape, "F32", lambda given=given: [given.view(np.uint8)]))  # type: ignore[misc]
        elif rule.required or rule.name.endswith(wanted):
            shape = tuple(rule.shape)
            tensors.append(
                RawTensor(rule.name, shape, kind_of(rule.name, shape), lambda n=rule.name, s=shape: pieces(n, s))  # type: ignore[misc]
            )
    write_tensors(path, {key: encode_value(key, value) for key, value in metadata.items()}, tensors)


# -- measuring ----------------------------------------------------------------------------------------


def fixture_of(n_tokens: int) -> Fixture:
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], n_tokens)
    return from_ids([int(i) for i in ids], name="random", chunk=n_tokens)


def native(path: Path) -> EngineSettings:
    """llama.cpp as a user runs it; without repacked copies of the weights where those would not fit beside the file."""
    settings = load_engine("native").changed(threads=usable_cores())
    fits = 2.5 * path.stat().st_size < this_machine().memory_bytes
    return settings if fits else settings.changed(extra_bufts=False)


def grade(path: Path, n_tokens: int) -> None:
    """In a process of its own: the reference's seconds and peak as JSON."""
    fixture = fixture_of(n_tokens)
    with open_gguf(path) as artifact:
        mark()
        start, before = time.perf_counter(), time.process_time()
        series = of_reference(artifact, fixture, Places.of(fixture), Precision(), None)
        took, worked = time.perf_counter() - start, time.process_time() - before
    print(json.dumps({"s": took, "cpu_s": worked, "peak": status("VmHWM"), "nll": float(series.nll.mean())}))


def measure(path: Path, n_tokens: int) -> None:
    command = [sys.executable, "-m", "bench.true_size", "grade", str(path), "--tokens", str(n_tokens)]
    ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    settings = native(path)
    with tempfile.TemporaryDirectory() as folder:
        chunks, before = fixture_of(n_tokens).chunks(), os.times().children_user
        theirs = Engine(settings).capture(path, chunks, Path(folder) / "capture", taps=LOGITS_ONLY)
    worked = os.times().children_user - before
    print(
        f"{n_tokens} tokens: reference {ours['s']:.0f} s ({ours['cpu_s']:.0f} s of the processors), peak "
        f"{ours['peak'] / 2**30:.2f} GiB, mean NLL {ours['nll']:.2f}; llama.cpp {theirs.eval_s:.0f} s after loading in "
        f"{theirs.load_s:.0f} s ({worked:.0f} s of the processors together); ratio {ours['s'] / theirs.eval_s:.2f}",
        flush=True,
    )


def whole_run(path: Path, n_tokens: int) -> None:
    """`diffharness run` without the grid and the noise, which are of the native engine."""
    with tempfile.TemporaryDirectory() as folder:
        save_fixture(fixture_of(n_tokens), Path(folder) / "ids.json")
        request = RunRequest(
            path,
            native(path),
            load_tolerances(),
            fixture=str(Path(folder) / "ids.json"),
            grid=None,
            noise=False,
            say=lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True),
        )
        mark()
        record = run(request)
    graph = record.legs.graph
    print(f"{record.verdict.primary}: {record.verdict.summary}")
    print(f"strict: {graph.strict}; graph {graph.status}, {graph.reason}")
    for told in (graph.as_defined, graph.with_conventions):
        if told is not None:
            print(f"worst local tap {told.worst_tap}, NMSE {told.worst_local} {told.arithmetic}; {told.logits}")
    print(f"peak {status('VmHWM') / 2**30:.2f} GiB; seconds: {record.timings}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.true_size")
    parser.add_argument("what", choices=[*SIZES, "grade"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    if given.what == "grade":
        grade(given.file, given.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = given.file or Path(folder) / f"{given.what}.gguf"
        made = not path.exists()
        if made:
            start = time.perf_counter()
            write(path, given.what)
            print(f"{path.stat().st_size / 1e9:.1f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        try:
            (whole_run if given.run else measure)(path, given.tokens)
        finally:
            if made and not given.keep:
                path.unlink()


if __name__ == "__main__":
    main()
