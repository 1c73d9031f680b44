"""A metadata key that neither the reference nor the engine knows: told, and no verdict by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffharness.errors import SettingsError
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from tests.e2e.conftest import MakePair
from tests.e2e.runs import whole_run

GIZMO = "llama.attention.gizmo"


def test_a_planted_key_is_told(make_pair: MakePair, tmp_path: Path) -> None:
    pair, gguf = make_pair("llama"), tmp_path / "gizmo.gguf"
    with open_gguf(pair.gguf) as source:
        # rope.scale_linear is an older name, which llama.cpp still reads.
        rewrite_gguf(source, gguf, kv={GIZMO: 3, "llama.rope.scale_linear": 1.0})
    record = whole_run(replace(pair, gguf=gguf))
    assert record.verdict.primary == "agree" and record.legs.graph.status == "pass"
    assert record.legs.graph.unknown_keys == [GIZMO]
    [note] = [finding for finding in record.findings if GIZMO in finding.message]
    assert note.kind is None and note.leg == "graph"


@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3moe"])
def test_nothing_is_told_of_a_file_as_converters_write_it(make_pair: MakePair, case: str) -> None:
    assert whole_run(make_pair(case)).legs.graph.unknown_keys == []


def test_an_override_that_nobody_reads_is_refused(make_pair: MakePair) -> None:
    with pytest.raises(SettingsError, match=r"found 'llama\.rope\.freq_bass'"):
        whole_run(make_pair("llama"), overrides=("llama.rope.freq_bass=float:50000",))
