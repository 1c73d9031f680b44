"""After a crash: the node is named, and the nearest settings that survive are found by trying."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.engine.runner import Engine, EngineCrash
from diffharness.engine.survive import VARIANTS, survive
from diffharness.settings import EngineSettings

from .planted import planted_python


def crash_of(settings: EngineSettings, model: Path, chunks: list[list[int]], out: Path) -> EngineCrash:
    with pytest.raises(EngineCrash) as caught:
        Engine(settings).capture(model, chunks, out)
    return caught.value


@pytest.mark.parametrize(
    ("when", "label"),
    [
        ("settings['extra_bufts']", "extra buffers off"),
        ("settings['flash_attn'] != 'off'", "flash attention off"),
        ("settings['threads'] > 1", "one thread"),
        # only where the text is longer than the first trial: must not be taken for a survivor there
        ("row + 16 >= 80 and settings['use_mmap']", "mmap off"),
        ("settings['extra_bufts'] or settings['flash_attn'] != 'off'", "extra buffers and flash attention off"),
    ],
)
def test_nearest_survivor(llama_gguf: Path, ids: list[int], tmp_path: Path, when: str, label: str) -> None:
    python = planted_python(tmp_path / "bin", "SIGILL", node="ffn_gate-1", when=when)
    settings = EngineSettings(threads=2, python=python, time_limit_s=120, n_ubatch=16, flash_attn="on")
    chunks = [ids + ids + ids]
    crash = crash_of(settings, llama_gguf, chunks, tmp_path / "c")
    found = survive(crash, settings, llama_gguf, chunks, tmp_path / "c", taps=["blk.*.layer_out"])
    assert found.label == label
    assert found.node["node"] == "ffn_gate-1"
    assert found.node["sources"][0] == {"name": "blk.1.ffn_gate.weight", "type": "F32", "shape": [64, 96, 1, 1]}
    assert found.run is not None and found.settings == found.run.settings
    assert found.run.taps == ["blk.0.layer_out", "blk.1.layer_out", "logits"]
    assert found.run.open().n_tokens == len(chunks[0])
    assert settings.differences(found.settings) == found.tried[-1].changes
    assert [attempt.outcome for attempt in found.tried[:-1]] == ["SIGILL"] * (len(found.tried) - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "c"]


def test_nothing_survives(llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    python = planted_python(tmp_path / "bin", "abort")
    settings = EngineSettings(threads=2, python=python, time_limit_s=120)
    crash = crash_of(settings, llama_gguf, [ids], tmp_path / "c")
    found = survive(crash, settings, llama_gguf, [ids], tmp_path / "c")
    assert (found.label, found.settings, found.run) == (None, None, None)
    changes = [tuple(sorted(attempt.changes)) for attempt in found.tried]
    assert len(changes) >= 6 and found.tried[-1].label == VARIANTS[-1][0]
    assert {attempt.outcome for attempt in found.tried} == {"SIGABRT"}
    assert found.traced is not None and found.traced.kind == "abort"


def test_a_refusal_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    settings = EngineSettings(threads=1)
    crash = crash_of(settings, tmp_path / "m.gguf", [[1, 2]], tmp_path / "c")
    found = survive(crash, settings, tmp_path / "m.gguf", [[1, 2]], tmp_path / "c")
    assert crash.kind == "refused" and found.tried == [] and found.run is None


def test_a_crash_that_tracing_hides_keeps_its_first_node(llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    python = planted_python(tmp_path / "bin", "SIGSEGV", when="not trace and settings['extra_bufts']")
    settings = EngineSettings(threads=1, python=python, time_limit_s=120)
    crash = crash_of(settings, llama_gguf, [ids], tmp_path / "c")
    found = survive(crash, settings, llama_gguf, [ids], tmp_path / "c")
    assert found.traced is None and found.node["node"] == "ffn_norm-1" and found.label == "extra buffers off"
