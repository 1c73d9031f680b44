from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from diffharness.engine import quantizer as module
from diffharness.engine.quantizer import Quantizer
from diffharness.engine.runner import Engine, EngineCrash
from diffharness.settings import EngineSettings
from diffharness.weights.dequant import dequantize
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import encode_floats

ROWS = np.random.default_rng(0).standard_normal((7, 512)).astype(np.float32)


@pytest.fixture(scope="module")
def quantizer() -> Iterator[Quantizer]:
    with Quantizer(EngineSettings(threads=2, time_limit_s=120)) as made:
        yield made


def worker_pid(of: Quantizer) -> int:
    assert of._dialogue is not None
    return of._dialogue._worker.process.pid


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_it_is_ggmls_quantizer(
    quantizer: Quantizer, quick: EngineSettings, make_gguf: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Bit for bit what llama_model_quantize makes of a file."""
    name, plain, made = "blk.0.ffn_down.weight", make_gguf(intermediate_size=256), tmp_path / "made.gguf"
    Engine(quick).quantize_like(plain, made, {name: kind})
    with open_gguf(plain) as source, open_gguf(made) as expected:
        assert expected.tensors[name].type == kind
        np.testing.assert_array_equal(quantizer.quantize(source.read(name), kind).reshape(-1), expected.raw(name))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_need_no_engine(kind: str) -> None:
    with Quantizer(EngineSettings(python=Path("/nonexistent"))) as made:
        np.testing.assert_array_equal(made.quantize(ROWS, kind).reshape(-1), encode_floats(ROWS, kind))


def test_importance_favours_its_columns(quantizer: Quantizer) -> None:
    importance = np.ones(512, dtype=np.float32)
    importance[::4] = 1e4
    plain, weighed = (quantizer.quantize(ROWS, "Q2_K", which) for which in (None, importance))
    errors = [(dequantize(blocks, "Q2_K", ROWS.shape) - ROWS)[:, ::4] for blocks in (plain, weighed)]
    assert np.square(errors[1]).mean() < 0.5 * np.square(errors[0]).mean()


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_XXS"])
def test_types_that_need_importance_get_equal_weights(quantizer: Quantizer, kind: str) -> None:
    ones = np.ones(512, dtype=np.float32)
    np.testing.assert_array_equal(quantizer.quantize(ROWS, kind), quantizer.quantize(ROWS, kind, ones))


def test_pieces_and_threads_change_nothing(quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantizer.quantize(ROWS, "Q4_K")
    monkeypatch.setattr(module, "_PIECE", 2 * 512)
    np.testing.assert_array_equal(quantizer.quantize(ROWS, "Q4_K"), whole)
    np.testing.assert_array_equal(quantizer.quantize(ROWS[::2], "Q4_K"), whole[::2])


def test_one_process_for_all_requests(quantizer: Quantizer) -> None:
    quantizer.quantize(ROWS, "Q8_0")
    pid = worker_pid(quantizer)
    larger = np.tile(ROWS, (40, 1))  # the memory grows
    blocks = quantizer.quantize(larger, "Q8_0")
    np.testing.assert_array_equal(blocks.reshape(-1), gguf.quantize(larger, gguf.GGMLQuantizationType.Q8_0).reshape(-1))
    assert quantizer.quantize(ROWS[:0], "Q8_0").shape == (0, 544)
    assert worker_pid(quantizer) == pid


@pytest.mark.parametrize(
    ("rows", "kind", "importance", "says"),
    [
        (ROWS, "Q9_9", None, "no tensor type"),
        (ROWS[:, :100], "Q4_K", None, "blocks have 256"),
        (ROWS, "Q4_K", np.ones(5, np.float32), "importance of shape"),
    ],
)
def test_what_cannot_be_made_is_refused_and_the_next_request_served(
    quantizer: Quantizer, rows: np.ndarray, kind: str, importance: np.ndarray | None, says: str
) -> None:
    quantizer.quantize(ROWS, "Q4_0")
    pid = worker_pid(quantizer)
    with pytest.raises(EngineCrash, match=says) as caught:
        quantizer.quantize(rows, kind, importance)
    assert caught.value.kind == "refused"
    quantizer.quantize(ROWS, "Q4_0")
    assert worker_pid(quantizer) == pid


def test_a_crash_is_reported_and_followed_by_a_new_process() -> None:
    with Quantizer(EngineSettings(threads=1, time_limit_s=120)) as made:
        before = made.quantize(ROWS, "Q4_0")
        pid = worker_pid(made)
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(EngineCrash, match="SIGSEGV while quantizing"):
            made.quantize(ROWS, "Q4_0")
        assert is_gone(pid)
        np.testing.assert_array_equal(made.quantize(ROWS, "Q4_0"), before)
        pid = worker_pid(made)
    assert is_gone(pid)


def test_a_type_that_ggml_aborts_on() -> None:
    """Q8_K is for activations."""
    with Quantizer(EngineSettings(threads=1, time_limit_s=120)) as made:
        with pytest.raises(EngineCrash, match="abort") as caught:
            made.quantize(ROWS, "Q8_K")
        assert caught.value.kind == "abort"


def test_no_engine_at_all() -> None:
    with Quantizer(EngineSettings(python=Path("/nonexistent"))) as made, pytest.raises(EngineCrash, match="start"):
        made.quantize(ROWS, "Q4_0")


def test_a_request_that_takes_too_long() -> None:
    with Quantizer(EngineSettings(threads=1, time_limit_s=1)) as made:
        with pytest.raises(EngineCrash) as caught:
            made.quantize(np.tile(ROWS, (2000, 8)), "IQ2_XS")
        assert caught.value.kind == "hang"


_INTERRUPTED = """
import sys, numpy as np
from diffharness.engine.quantizer import Quantizer
from diffharness.settings import EngineSettings
with Quantizer(EngineSettings(threads=1)) as quantizer:
    quantizer.quantize(np.ones((1, 256), np.float32), "Q4_0")
    print(quantizer._dialogue._worker.process.pid, flush=True)
    quantizer.quantize(np.random.default_rng(0).standard_normal((4000, 4096)).astype(np.float32), "IQ2_XS")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_interrupted_run(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        pid = int(process.stdout.readline())
    time.sleep(0.3)
    assert not is_gone(pid)
    process.send_signal(number)
    process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(pid)
