"""The engine end to end on tiny models: captures, vocabularies, quantizing, and every way to die."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from diffharness.captures import Capture
from diffharness.engine.runner import Engine, EngineCrash, check_overrides
from diffharness.errors import FixtureError, OutputError, SettingsError
from diffharness.settings import EngineSettings

from .conftest import N_VOCAB, InMemory, tiny
from .planted import planted_python


def test_a_run_says_what_it_was(llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    run = Engine(quick).capture(
        llama_gguf,
        [ids[:20], ids[20:]],
        tmp_path / "c",
        meta={"engine": "native"},
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(1, 2), (2, 2)]
    assert run.capture == tmp_path / "c" and run.taps == run.open().taps
    assert run.open().meta["engine"] == "native"
    assert run.n_nodes > 40 and run.load_s > 0 and run.eval_s > 0 and run.missing == []
    assert {"version", "commit", "system_info", "bindings", "library", "devices", "python"} <= run.info.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_callback_changes_nothing(llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path) -> None:
    engine = Engine(quick)
    off = engine.capture(llama_gguf, [ids], tmp_path / "off", taps=[])
    on = engine.capture(llama_gguf, [ids], tmp_path / "on")
    assert off.taps == ["logits"] and off.n_nodes == 0
    np.testing.assert_array_equal(off.open().read("logits"), on.open().read("logits"))


def test_taps_can_be_chosen(llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path) -> None:
    run = Engine(quick).capture(llama_gguf, [ids], tmp_path / "c", taps=["blk.*.layer_out", "blk.0.moe_logits"])
    assert run.taps == ["blk.0.layer_out", "blk.1.layer_out", "logits"]
    assert run.missing == ["blk.0.moe_logits"]


def test_each_chunk_starts_from_an_empty_cache(
    llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path
) -> None:
    both = Engine(quick).capture(llama_gguf, [ids[:20], ids[20:]], tmp_path / "both").open()
    second = Engine(quick).capture(llama_gguf, [ids[20:]], tmp_path / "second").open()
    for tap in second.taps:
        np.testing.assert_array_equal(both.read(tap)[20:], second.read(tap), err_msg=tap)


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(64, 8), (16, 16), (7, 3)])
def test_batches_put_rows_in_their_place(
    llama_gguf: Path, ids: list[int], tmp_path: Path, n_batch: int, n_ubatch: int
) -> None:
    whole = Engine(EngineSettings(threads=1, type_k="F32", type_v="F32", flash_attn="off"))
    pieces = Engine(whole.settings.changed(n_batch=n_batch, n_ubatch=n_ubatch))
    a = whole.capture(llama_gguf, [ids[:30], ids[30:]], tmp_path / "a").open()
    b = pieces.capture(llama_gguf, [ids[:30], ids[30:]], tmp_path / "b").open()
    assert a.taps == b.taps
    for tap in a.taps:
        np.testing.assert_allclose(a.read(tap), b.read(tap), rtol=2e-3, atol=2e-4, err_msg=tap)


def test_overrides_change_the_graph(llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path) -> None:
    plain = Engine(quick).capture(llama_gguf, [ids], tmp_path / "a").open()
    overrides = ["llama.rope.freq_base=float:100"]
    run = Engine(quick).capture(llama_gguf, [ids], tmp_path / "b", overrides=overrides).open()
    differ = [tap for tap in plain.taps if not np.array_equal(plain.read(tap), run.read(tap))]
    assert differ[0] == "blk.0.attn_q_rope"


@pytest.mark.parametrize(
    "text",
    ["", "a", "a=int", "a=int:x", "a=int:" + "9" * 20, "a=float:x", "a=bool:1", "a=str:" + "x" * 128, "=int:1"],
)
def test_malformed_overrides(text: str) -> None:
    with pytest.raises(SettingsError, match="KEY=TYPE:VALUE"):
        check_overrides([text])


def test_overrides_of_every_type_are_taken(
    llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path
) -> None:
    texts = [
        "llama.context_length=int:128",
        "llama.rope.freq_base=float:5e3",
        "tokenizer.ggml.add_bos_token=bool:false",
        "general.name=str:other=name",
    ]
    run = Engine(quick).capture(llama_gguf, [ids[:4]], tmp_path / "c", taps=[], overrides=texts)
    for key in ("llama.context_length", "llama.rope.freq_base"):
        assert any("override" in line and key in line for line in run.log), key


def test_ids_outside_of_the_vocabulary(llama_gguf: Path, quick: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(FixtureError, match=f"token {N_VOCAB} is outside"):
        Engine(quick).capture(llama_gguf, [[1, N_VOCAB]], tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(llama_gguf: Path, quick: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        Engine(quick).capture(llama_gguf, [[1, 2]], tmp_path / "absent" / "c")


def test_vocabulary_of_a_model_without_tokenizer(llama_gguf: Path, quick: EngineSettings) -> None:
    vocabulary = Engine(quick).vocabulary(llama_gguf, [1])
    assert vocabulary.n_vocab == N_VOCAB and not vocabulary.has_tokenizer and vocabulary.pieces == {}
    with pytest.raises(EngineCrash, match="has no tokenizer") as caught:
        Engine(quick).tokenize(llama_gguf, ["text"])
    assert caught.value.kind == "refused"


def test_each_tensor_in_the_type_it_is_given(llama_gguf: Path, quick: EngineSettings, tmp_path: Path) -> None:
    types = {"blk.0.attn_q.weight": "Q4_0", "blk.1.ffn_up.weight": "Q5_1", "token_embd.weight": "Q8_0"}
    path = Engine(quick).quantize_like(llama_gguf, tmp_path / "like.gguf", types)
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name: found[name] for name in types} == types
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert [file.name for file in tmp_path.iterdir()] == ["like.gguf"]


def test_a_mixture(llama_gguf: Path, quick: EngineSettings, tmp_path: Path) -> None:
    path = Engine(quick).quantize(llama_gguf, tmp_path / "q8.gguf", "Q8_0")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert found["blk.0.attn_q.weight"] == "Q8_0"
    with pytest.raises(EngineCrash, match="no quantization"):
        Engine(quick).quantize(llama_gguf, tmp_path / "x.gguf", "Q4_NO")


# -- dying ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "kind", "signal_name", "says"),
    [
        ("SIGSEGV", "signal", "SIGSEGV", "died of SIGSEGV while evaluating"),
        ("SIGILL", "signal", "SIGILL", "died of SIGILL"),
        ("abort", "abort", "SIGABRT", r"GGML_ASSERT\(ne00 == ne01\) failed"),
        ("allocate", "oom", "SIGABRT", "out of memory.*failed to allocate buffer"),
        ("SIGKILL", "oom", "SIGKILL", "killed from outside"),
        ("memory", "oom", None, "no memory left"),
        ("silent", "exit", None, "exit code 0 and without a result"),
        ("exit3", "exit", None, "exit code 3"),
        ("raise", "exit", None, "ZeroDivisionError: planted"),
    ],
)
def test_every_way_to_die(
    llama_gguf: Path, ids: list[int], tmp_path: Path, action: str, kind: str, signal_name: str | None, says: str
) -> None:
    python = planted_python(tmp_path / "bin", action)
    engine = Engine(EngineSettings(threads=1, python=python, time_limit_s=120))
    with pytest.raises(EngineCrash) as caught:
        engine.capture(llama_gguf, [ids], tmp_path / "c")
    crash = caught.value
    assert (crash.kind, crash.signal_name, crash.phase) == (kind, signal_name, "eval")
    assert re.search(says, str(crash)), str(crash)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "nothing half-written is left"


def test_last_node_is_named_and_traced(llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    python = planted_python(tmp_path / "bin", "SIGSEGV", node="ffn_up-1")
    engine = Engine(EngineSettings(threads=1, python=python, time_limit_s=120))
    with pytest.raises(EngineCrash, match=r"last node begun: ffn_up-1 \(MUL_MAT\)") as caught:
        engine.capture(llama_gguf, [ids], tmp_path / "c")
    assert caught.value.node["op"] == "MUL_MAT"
    with pytest.raises(EngineCrash) as traced:
        engine.capture(llama_gguf, [ids], tmp_path / "c", trace=True)
    weight = traced.value.node["sources"][0]
    assert (weight["name"], weight["type"]) == ("blk.1.ffn_up.weight", "F32")
    assert traced.value.as_dict()["signal"] == "SIGSEGV"


def test_a_hang_ends_at_the_limit(llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    python = planted_python(tmp_path / "bin", "hang")
    started = time.monotonic()
    with pytest.raises(EngineCrash, match="did not finish within 5 s") as caught:
        Engine(EngineSettings(threads=1, python=python, time_limit_s=5)).capture(llama_gguf, [ids], tmp_path / "c")
    assert caught.value.kind == "hang" and caught.value.node["node"] == "ffn_norm-1"
    assert 5 <= time.monotonic() - started < 60


@pytest.mark.parametrize("what", ["text", "empty", "missing tensor"])
def test_refusals_are_in_the_engines_words(quick: EngineSettings, tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.gguf"
    if what == "missing tensor":
        write_without(tiny(), "blk.1.attn_k.weight", path)
    else:
        path.write_bytes(b"no model at all" if what == "text" else b"")
    says = {"text": "magic", "empty": "model.gguf", "missing tensor": r"blk\.1\.attn_k\.weight"}[what]
    with pytest.raises(EngineCrash, match=says) as caught:
        Engine(quick).capture(path, [[1, 2]], tmp_path / "c")
    assert (caught.value.kind, caught.value.phase) == ("refused", "load")


def write_without(source: InMemory, name: str, path: Path) -> None:
    from diffharness.weights.gguf_write import write_gguf

    arrays = {key: array for key, array in source.arrays.items() if key != name}
    write_gguf(path, InMemory(source.arch, source.metadata, arrays), type_of=lambda info: "F32")


def test_interpreters_without_llama_cpp_or_absent(llama_gguf: Path, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(EngineCrash):
        Engine(EngineSettings(python=bare)).info()
    with pytest.raises(EngineCrash, match="cannot start"):
        Engine(EngineSettings(python=tmp_path / "absent")).info()


def test_another_folder_of_libraries(quick: EngineSettings, llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    here = Path(Engine(quick).info()["library"]).parent
    there = tmp_path / "lib"
    there.mkdir()
    for file in here.iterdir():
        (there / file.name).symlink_to(file.resolve())
    engine = Engine(quick.changed(lib_dir=there))
    assert engine.info()["library"] == str(there / Path(Engine(quick).info()["library"]).name)
    assert engine.capture(llama_gguf, [ids], tmp_path / "c").n_nodes > 0


def _worker_of(parent: int) -> int | None:
    """The worker that this process started, by its command line, which ends with its parent's id."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile
        is_worker = any(b"diffharness.engine.worker" in argument for argument in arguments)
        if is_worker and str(parent).encode() in arguments:
            return int(entry.name)
    return None


def _wait_for(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def _group_is_gone(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
# A killed parent cannot tidy up what its worker started; an interrupted one can.
@pytest.mark.parametrize(
    ("action", "how"), [("hang", signal.SIGINT), ("orphan", signal.SIGINT), ("hang", signal.SIGKILL)]
)
def test_no_orphans(llama_gguf: Path, tmp_path: Path, action: str, how: signal.Signals) -> None:
    python = planted_python(tmp_path / "bin", action)
    code = textwrap.dedent(f"""
        from diffharness.engine.runner import Engine
        from diffharness.settings import EngineSettings
        try:
            Engine(EngineSettings(threads=1, python={str(python)!r})).capture(
                {str(llama_gguf)!r}, [[1, 2, 3]], {str(tmp_path / "c")!r})
        except KeyboardInterrupt:
            print("interrupted")
    """)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert _wait_for((tmp_path / "c.part").exists)
    worker = _worker_of(parent.pid)
    assert worker is not None
    time.sleep(1.0)  # until it sleeps in the planted node
    parent.send_signal(how)
    output, _ = parent.communicate(timeout=30)
    assert _wait_for(lambda: _group_is_gone(worker), 10)
    if how == signal.SIGINT:
        assert output.strip() == "interrupted"
        assert not (tmp_path / "c.part").exists() and not (tmp_path / "c").exists()


def test_capture_survives_its_reader(llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path) -> None:
    values = Capture(Engine(quick).capture(llama_gguf, [ids], tmp_path / "c", taps=[]).capture or "").read("logits")
    assert values.shape == (len(ids), N_VOCAB) and np.isfinite(values).all()
