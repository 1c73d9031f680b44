"""Captures: written in pieces, read by us and by the safetensors library; hostile files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from diffharness import captures
from diffharness.captures import Capture, CaptureWriter
from diffharness.errors import BadInputError, DiffharnessError, OutputError


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_round_trip_in_pieces_and_out_of_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 11)).astype(np.float32)
    q = rng.standard_normal((7, 4)).astype(np.float32)
    with CaptureWriter(tmp_path / "run.safetensors", 7, {"engine": "native"}) as writer:
        writer.write("logits", 3, logits[3:])
        writer.write("blk.0.attn_q", 0, np.zeros((7, 4), np.float32))
        writer.write("logits", 0, logits[:3])
        writer.write("blk.0.attn_q", 0, q)  # the last value stays
        assert not (tmp_path / "run.safetensors").exists()
    capture = Capture(tmp_path / "run.safetensors")
    assert capture.taps == ["blk.0.attn_q", "logits"]
    assert capture.n_tokens == 7 and capture.meta["engine"] == "native"
    np.testing.assert_array_equal(capture.read("logits"), logits)
    np.testing.assert_array_equal(capture.read("blk.0.attn_q"), q)
    with safe_open(str(capture.path), framework="numpy") as file:
        assert file.metadata() == capture.meta
        np.testing.assert_array_equal(file.get_tensor("logits"), logits)
        np.testing.assert_array_equal(file.get_tensor("blk.0.attn_q"), q)
    assert list(tmp_path.iterdir()) == [capture.path]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_any_widths_load_in_safetensors(tmp_path_factory: pytest.TempPathFactory, widths: list[int], n: int) -> None:
    path = tmp_path_factory.mktemp("c") / "c.safetensors"
    with CaptureWriter(path, n) as writer:
        for il, width in enumerate(widths):
            writer.write(f"blk.{il}.ffn_out", 0, np.full((n, width), il, np.float32))
    with safe_open(str(path), framework="numpy") as file:
        assert {key: file.get_tensor(key).shape for key in file.keys()} == {  # noqa: SIM118
            f"blk.{il}.ffn_out": (n, width) for il, width in enumerate(widths)
        }


def test_missing_rows_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiffharnessError, match=r"logits: 2 of 3"), CaptureWriter(tmp_path / "c", 3) as writer:
        writer.write("logits", 1, np.ones((1, 2), np.float32))
        assert writer.incomplete() == {"logits": 2}
    assert list(tmp_path.iterdir()) == []


def test_rows_that_never_came_can_be_filled(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "c", 4) as writer:
        writer.write("logits", 1, np.ones((2, 3), np.float32))
        writer.fill(np.nan)
    assert np.isnan(Capture(tmp_path / "c").read("logits")).all(axis=1).tolist() == [True, False, False, True]


def test_failure_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CaptureWriter(tmp_path / "c", 3) as writer:
        writer.write("logits", 0, np.ones((3, 2), np.float32))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("start", "shape"), [(2, (2, 4)), (-1, (1, 4)), (0, (1, 5))])
def test_rows_that_do_not_fit(tmp_path: Path, start: int, shape: tuple[int, int]) -> None:
    writer = CaptureWriter(tmp_path / "c", 3)
    writer.write("logits", 0, np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match="logits"):
        writer.write("logits", start, np.ones(shape, np.float32))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        CaptureWriter(tmp_path / "absent" / "c", 1)


def test_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = captures.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(captures.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="no space for tap logits"), CaptureWriter(tmp_path / "c", 8) as writer:
        writer.write("logits", 0, np.ones((8, 64), np.float32))
    assert list(tmp_path.iterdir()) == []


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**ENTRY, "shape": [2, 4]}},
        {"a": {**ENTRY, "shape": [2**62, 2**62]}},
        {"a": {**ENTRY, "shape": [-2, -3]}},
        {"a": {**ENTRY, "shape": [6]}},
        {"a": {**ENTRY, "data_offsets": [24, 0]}},
        {"a": {**ENTRY, "data_offsets": [8, 32]}},
        {"a": {**ENTRY, "data_offsets": [0.0, 24]}},
        {"a": {**ENTRY, "dtype": "F16"}},
        {"a": ENTRY, "b": {**ENTRY, "shape": [1, 6]}},
        {"a": 3},
        {"__metadata__": {"x": 1}},
        [],
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any) -> None:
    path = write_header(tmp_path / "c", header, bytes(24))
    with pytest.raises(BadInputError, match="not a capture"):
        Capture(path)


def test_header_length_past_the_end(tmp_path: Path) -> None:
    for length in (2**64 - 1, 1000):
        with pytest.raises(BadInputError, match="claims"):
            Capture(write_header(tmp_path / "c", {}, length=length))
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(BadInputError, match="too few"):
        Capture(tmp_path / "short")
    with pytest.raises(BadInputError, match="cannot read"):
        Capture(tmp_path / "absent")
