"""The report of an inspection: what is shown of it, in 100 columns, whatever the file's strings are."""

from __future__ import annotations

import math
from typing import Any

from diffharness.forensics import classes
from diffharness.records import ArtifactSubject, Finding, MetadataRow, Subject, Verdict
from diffharness.records.inspect import Bins, InspectRecord, Measures, PatternRow, TensorMeasures
from diffharness.report.document import to_markdown, to_text
from diffharness.report.inspect import document, worst

KINDS = (["sliding"] * 5 + ["global"]) * 2


def numbers(error: float = 0.07, **more: Any) -> Measures:
    told = {
        "cos": 0.99, "cos_row_min": 0.9, "cos_row_p1": 0.95, "cos_row_p50": 0.99, "error": error, "sqnr": 23.0,
        "scale": 1.0, "max_abs": 0.1, "kl_drift": 1e-4, "outlier_kept": 1.0, "channel_kept": 1.0,
    }  # fmt: skip
    return Measures(**(told | more))


def tensor(il: int, part: str, hit: bool = False, **more: Any) -> TensorMeasures:
    name = f"blk.{il}.{part}.weight"
    told: dict[str, Any] = {
        "artifact": numbers(0.7 if hit else 0.07), "control": numbers(), "ratio": 10.0 + il if hit else 1.0,
        "drifted": hit, "why": "error; all rows" if hit else None, "bpw": 4.5,
    }  # fmt: skip
    return TensorMeasures(
        name=name, type="Q4_K", shape=[64, 64], layer=il, klass=classes.class_of(name), **(told | more)
    )


def record(hit: tuple[int, ...] = (2, 3, 8, 9), **more: Any) -> InspectRecord:
    tensors = [tensor(il, part, il in hit and part != "ffn_up") for il in range(12) for part in PARTS]
    tensors.append(tensor(0, "attn_norm", artifact=numbers(0.0), ratio=0.0))
    told: dict[str, Any] = {
        "verdict": Verdict(primary="artifact.weights", all=["artifact.weights"], summary="S.", next_step="restore it"),
        "subject": Subject(artifact=ArtifactSubject(path="m.gguf")),
        "totals": classes.totals(tensors), "tensors": tensors, "classes": classes.by_class(tensors),
        "layers": classes.by_layer(tensors), "grid": classes.grid(tensors), "layer_kinds": KINDS,
        "bins": Bins(n=19, span=4.25, smoothing=0.5), "repro": "diffharness inspect m.gguf --checkpoint c",
    }  # fmt: skip
    return InspectRecord(**(told | more))


PARTS = ("attn_q", "attn_post_attention_projection", "ffn_up")


def test_all_parts_are_there_in_a_hundred_columns() -> None:
    pattern = PatternRow(kind="periodic", message="attn_q in every layer whose number mod 6 is one of 2, 3")
    key = MetadataRow(key="m.rope.freq_base", artifact=None, checkpoint=1e6, used=True)
    shown = document(record(patterns=[pattern], metadata=[key], missing=["rope_freqs.weight"], ignored=["vision.x"]))
    text = to_text(shown)
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "8 of 37 tensors drifted, 4 of them in attention", "periodic: attn_q in every layer", "23.0", "missing",
        "1 tensor: rope_freqs.weight", "1 tensor: vision.x", "19 bins: mean +- 4.25", "Next: restore it",
        "the forward",
    ):  # fmt: skip
        assert words in text, words
    assert "| blk.9.attn\\_q | Q4\\_K |" in to_markdown(shown) or "blk.9.attn" in to_markdown(shown)


def test_sound_layers_share_a_line_of_the_grid() -> None:
    lines = to_text(document(record())).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Layer x class"))
    rows = [line.split() for line in lines[start + 2 : start + 10]]
    assert [row[0] for row in rows if row] == ["0", "1", "2", "3", "4-7", "8", "9", "10,"]
    assert rows[2] == ["2", "sliding", "12.0", ".", "-", "12.0"]


def test_no_grid_and_the_furthest_five_where_nothing_drifted() -> None:
    shown = record(hit=())
    text = to_text(document(shown))
    assert "Layer x class" not in text and "none of them further than its type explains" in text
    assert len(worst(shown.tensors)) == 5


def test_few_of_a_class_and_the_unreadable_first() -> None:
    tensors = [*record().tensors, tensor(11, "ffn_down", True, artifact=None, control=None, ratio=None)]
    tensors.append(tensor(5, "ffn_gate", True, nan=3, artifact=numbers(math.inf), ratio=math.inf))
    shown = worst(tensors)
    assert {t.klass for t in shown[:2]} == {"ffn_down", "ffn_gate"}
    assert sum(t.klass == "attn_q" for t in shown) == 3
    assert "Q4_K" in to_text(document(record(tensors=tensors)))


def test_strings_of_a_file_cannot_steer_the_terminal() -> None:
    finding = Finding(kind=None, leg="artifact", message="evil \x1b[31m")
    key = MetadataRow(key="m.\x1b[2J", artifact="\x07", checkpoint=["x"] * 500, used=False)
    text = to_text(document(record(findings=[finding], metadata=[key])))
    assert "\x1b" not in text and "\x07" not in text
