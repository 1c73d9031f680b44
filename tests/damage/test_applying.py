"""What holds for every fault: types kept, nothing else touched, seeded, said in the copy, refused where idle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from diffharness.damage import FAULTS, KEY, Damage, Options, apply
from diffharness.errors import ArtifactFileError, BadInputError, CheckpointError, OutputError
from diffharness.layers import parse_layers
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import WeightSource
from tests.damage.conftest import N_LAYER, raws, values

Make = Callable[..., Damage]
# Faults that need other tensors or another strength than their default to do something to the model of this folder.
ELSEWHERE: dict[str, dict[str, str | float]] = {
    "swapped-q-k": {"tensors": "nothing"},
    "f16-overflow": {"tensors": "blk.*.ffn_up.weight"},
    "wrong-scales": {"strength": 0.3},
}
REFUSED = {"swapped-q-k": "attn_q.weight is \\(256, 256\\)"}


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in REFUSED])
def test_every_fault_changes_what_it_says_and_nothing_else(model: Path, damaged: Make, name: str) -> None:
    done = damaged(name, **ELSEWHERE.get(name, {}))
    if done.truncated_from is not None:
        assert done.out.stat().st_size == done.n_bytes < done.truncated_from
        with pytest.raises(ArtifactFileError):
            open_gguf(done.out)
        return
    before, after = raws(model), raws(done.out)
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing == set(done.tensors)
    with open_gguf(model) as clean, open_gguf(done.out) as copy:
        assert list(copy.tensors) == [t for t in clean.tensors if t in after], "the order is the source's"
        assert all(copy.tensors[t].type == clean.tensors[t].type for t in copy.tensors), "the type gives nothing away"
        keys = {c.name for c in done.changes if c.type is None and c.changed}
        a, b = clean.kv_raw(), copy.kv_raw()
        assert {key for key in {*a, *b} if a.get(key) != b.get(key)} == keys | {KEY}
        note = json.loads(copy.metadata[KEY])
    assert differing or keys
    assert note["how"] == done.faults and note["seed"] == 0
    assert set(note["tensors"]) >= set(done.tensors) and set(note["keys"]) >= keys


@pytest.mark.parametrize(
    "name", ["noise", "permuted-rows", "bit-flips", "swapped", "attention-drift", "permuted-layers"]
)
def test_the_seed_decides(damaged: Make, name: str) -> None:
    one, again = damaged(name, seed=3, out="a").out.read_bytes(), damaged(name, seed=3, out="b").out.read_bytes()
    assert one == again
    assert damaged(name, seed=4, out="c").out.read_bytes() != one


def test_faults_in_turn(model: Path, damaged: Make) -> None:
    done = damaged("scale:2", "bit-flips:3", "permuted-rows", tensors="blk.1.ffn_up.weight")
    clean, after = values(model)["blk.1.ffn_up.weight"], values(done.out)["blk.1.ffn_up.weight"]
    order = [int((clean * 2 == row).sum(axis=1).argmax()) for row in after]
    assert sorted(order) == list(range(512)) and order != sorted(order)
    assert 0 < (after != clean[order] * 2).sum() <= 3
    assert done.changes[0].what == "times 2, then 3 bits flipped, then 1 of its rows moved"


def test_layers_and_patterns(damaged: Make) -> None:
    done = damaged("scale", tensors="blk.*.attn_q.weight,blk.*.attn_k.weight", layers=parse_layers("1-2,5"))
    assert set(done.tensors) == {f"blk.{il}.attn_{x}.weight" for il in (1, 2, 5) for x in "qk"}


def test_as_f32(model: Path, damaged: Make) -> None:
    done = damaged("scale:1.0000001", tensors="blk.0.attn_q.weight", type="F32")
    with open_gguf(done.out) as copy:
        assert copy.tensors["blk.0.attn_q.weight"].type == "F32"
    np.testing.assert_allclose(values(done.out)["blk.0.attn_q.weight"], values(model)["blk.0.attn_q.weight"], rtol=1e-6)


def test_starts_from_the_checkpoint(model: Path, damaged: Make) -> None:
    """The values that are damaged are the checkpoint's, not those that the artifact kept of them."""
    with open_gguf(model) as artifact:

        class Clean:
            label, arch, metadata, tensors = "clean", artifact.arch, artifact.metadata, artifact.tensors

            def read(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
                return np.full(artifact.tensors[name].shape, 3, dtype=np.float32)

            take = None

        done = damaged("scale:2", tensors="blk.0.ffn_up.weight", checkpoint=Clean())
    assert (values(done.out)["blk.0.ffn_up.weight"] == 6).all()


def test_keys_are_set_and_dropped(damaged: Make) -> None:
    done = damaged(
        set_keys=["llama.rope.freq_base=float:1e4", "my.own=str:x y", "llama.block_count=int:6"],
        drop_keys=["llama.attention.sliding_window"],
    )
    with open_gguf(done.out) as copy:
        assert copy.metadata["llama.rope.freq_base"] == 1e4 and copy.metadata["my.own"] == "x y"
        assert "llama.attention.sliding_window" not in copy.metadata
        assert copy.kv_types["llama.rope.freq_base"] == "FLOAT32"
    assert {c.name: c.changed for c in done.changes} == {
        "llama.rope.freq_base": True,
        "my.own": True,
        "llama.block_count": False,
        "llama.attention.sliding_window": True,
    }


@pytest.mark.parametrize(
    ("how", "more", "message"),
    [
        (["scael"], {}, "no fault 'scael'"),
        ([], {}, "expected a fault"),
        (["scale"], {"tensors": "blk.9*"}, "matches none of the 69 tensors"),
        (["scale"], {"layers": frozenset({N_LAYER})}, "is in layers \\[6\\]"),
        (["scale"], {"strength": 1.0}, "changed nothing"),
        (["noise"], {"strength": 200.0, "tensors": "*.attn_q.weight"}, "changed nothing"),
        (["noise"], {"strength": math.nan}, "is a finite number, found nan"),
        (["zero-blocks"], {"strength": 1.5}, "from 0 to 1, found 1.5"),
        (["transposed"], {"strength": 2.0}, "takes no strength"),
        (["scale:x"], {}, "expected a number"),
        (["scale", "noise"], {"strength": 2.0}, "does not say whose"),
        (["permuted-heads"], {"tensors": "*.attn_output.weight"}, "not those of heads"),
        (["permuted-experts"], {"tensors": "*.ffn_up.weight"}, "holds no experts"),
        (["permuted-layers"], {"layers": frozenset({1})}, "no two of the layers"),
        (["swapped-q-k"], {}, REFUSED["swapped-q-k"]),
        (["swapped-gate-up"], {"tensors": "blk.*.attn_q.weight"}, "no layer of those"),
        (["duplicated"], {"tensors": "output_norm.weight"}, "in another layer"),
        (["swapped"], {"tensors": "token_embd.weight"}, "same shape"),
        (["f16-overflow"], {"tensors": "*.attn_q.weight"}, "Q4_K cannot hold"),
        (["eps-hard-coded"], {"strength": 9.999999747378752e-06}, "already"),
        (["issue-6056"], {"tensors": "*_norm.weight"}, "changes nothing"),
        (["truncated"], {"strength": 1.0}, "changed nothing"),
        ([], {"set_keys": ["llama.rope.freq_base=int:7"]}, "is FLOAT32 in the file"),
        ([], {"set_keys": ["llama.rope.freq_base=7"]}, "not KEY=TYPE:VALUE"),
        ([], {"set_keys": ["x=bool:7"]}, "is no bool"),
        ([], {"set_keys": ["general.architecture=str:qwen2"]}, "cannot be changed"),
        ([], {"set_keys": ["llama.block_count=int:6"]}, "changed nothing"),
        ([], {"drop_keys": ["no.key"]}, "no such key"),
    ],
)
def test_refused(damaged: Make, tmp_path: Path, how: list[str], more: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        damaged(*how, **more)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_never_the_input_itself(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    for out in (model, link):
        with pytest.raises(BadInputError, match="is the input itself"):
            apply(model, out, ["bit-flips"])


def test_a_checkpoint_of_another_architecture(model: Path, tmp_path: Path) -> None:
    other = SimpleNamespace(label="other", arch="gemma4", tensors={}, metadata={})
    with pytest.raises(CheckpointError, match=r"other is a gemma4 model, the artifact .* says llama"):
        apply(model, tmp_path / "out.gguf", ["bit-flips"], checkpoint=cast(WeightSource, other))


def test_never_in_place_of_a_pipe(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pipe"
    os.mkfifo(out)
    with pytest.raises(OutputError, match="a device or pipe"):
        apply(model, out, ["bit-flips"])
    assert out.is_fifo() and list(tmp_path.iterdir()) == [out]


def test_nowhere_to_write(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        apply(model, tmp_path / "no" / "folder.gguf", ["bit-flips"])


def test_without_a_quantizer(model: Path, tmp_path: Path) -> None:
    """Floats and whole rows need none."""
    for how in ("offset", "permuted-rows", "bit-flips"):
        apply(model, tmp_path / "out.gguf", [how])
    with pytest.raises(BadInputError, match="needs a quantizer"):
        apply(model, tmp_path / "out.gguf", ["scale"], options=Options(tensors="*.attn_q.weight"))
