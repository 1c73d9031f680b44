"""Ladders on real and random checkpoints: the file that is written gives the numbers that were simulated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffharness.engine.runner import Engine
from diffharness.errors import BadInputError, FixtureError, SettingsError
from diffharness.fixture import from_ids, load_fixture, save_fixture
from diffharness.forensics.recipes import Recipe
from diffharness.forensics.recipes.library import load_ladder, load_recipe
from diffharness.metrics import nll_per_position, perplexity
from diffharness.pipeline import synthesizing
from diffharness.pipeline.recipes import RecipeRequest, checkpoint_fixture, run_recipes
from diffharness.records.base import parse
from diffharness.records.recipe import RecipeRecord
from diffharness.report.recipe import document
from diffharness.settings import data_dir, load_engine
from diffharness.weights.checkpoint import Checkpoint
from tests.oracles.conftest import Tiny
from tests.oracles.conftest import make_tiny as make_tiny

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
ENGINE = load_engine("native").changed(threads=1)


def request(recipes: list[Recipe], **more: object) -> RecipeRequest:
    defaults: dict[str, object] = {
        "checkpoint": EMBEDDED / "checkpoint",
        "engine": ENGINE,
        "fixture": str(EMBEDDED / "heldout.json"),
    }
    return RecipeRequest(recipes=recipes, **{**defaults, **more})  # type: ignore[arg-type]


def test_the_ladder_of_the_embedded_model() -> None:
    record = run_recipes(request(load_ladder("gemma4"), ladder="gemma4"))
    assert record.baseline.ppl.value == pytest.approx(2.0312, abs=1e-4)
    assert record.baseline.bits_per_weight == pytest.approx(16, abs=0.1)
    names = ["int4", "int4-down-embd-int8", "asym4-down-embd-int8", "gate-up-int4", "gate-up-asym4"]
    assert [rung.name for rung in record.rungs] == names
    bits = [rung.bits_per_weight for rung in record.rungs]
    assert bits == sorted(bits) and 4.5 < bits[0] < 4.7
    kl = [rung.statistics.kl.value for rung in record.rungs]
    assert kl == sorted(kl, reverse=True) and 1e-3 < kl[0] < 1e-2
    for rung in record.rungs:
        assert rung.statistics.ppl_base.value == record.baseline.ppl.value
        assert rung.statistics.kl.error and rung.statistics.difference.error and not rung.can_be_written
        assert sum(rung.schemes.values()) == len(Checkpoint(EMBEDDED / "checkpoint").tensors)
    assert parse(RecipeRecord, record.to_json(), "there") == record


def test_recipes_of_a_ladder_that_a_model_has_no_use_for_are_left_out(tmp_path: Path) -> None:
    made = synthesizing.run(synthesizing.SynthRequest("mamba", tmp_path, ENGINE, n_tokens=32))
    own = {"checkpoint": Path(made.checkpoint), "fixture": made.fixture}
    ladder = load_ladder("gemma4")
    names = frozenset(recipe.name for recipe in ladder)
    record = run_recipes(request(ladder, ladder="gemma4", optional=names, **own))
    assert [rung.name for rung in record.rungs] == ["int4"]
    assert set(record.left_out) == names - {"int4"}
    assert "'*ffn_down*' to match a tensor" in record.left_out["int4-down-embd-int8"]
    assert "left out: recipe int4-down-embd-int8" in str(document(record))
    for wanted in (ladder[1:], ladder):  # nothing is left, or all were asked for by name
        with pytest.raises(SettingsError, match="ffn_"):
            run_recipes(request(wanted, optional=names if wanted is not ladder else frozenset(), **own))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ2_XS"])
def test_written_and_read_back_gives_what_was_simulated(name: str, tmp_path: Path) -> None:
    out = tmp_path / f"{name}.gguf"
    record = run_recipes(request([load_recipe(name)], write=out))
    (rung,) = record.rungs
    assert rung.can_be_written and record.written is not None
    assert record.written.ppl == pytest.approx(rung.statistics.ppl.value, abs=5e-5)
    assert record.written.n_bytes == out.stat().st_size > rung.n_bytes
    fixture = load_fixture(EMBEDDED / "heldout.json").first(512)
    run = Engine(ENGINE).capture(out, fixture.chunks(), tmp_path / "native.safetensors", taps=[])
    logits = run.open().read("logits")[fixture.scored_positions()]
    by_engine = perplexity(nll_per_position(logits, fixture.next_ids()))
    assert by_engine == pytest.approx(rung.statistics.ppl.value, rel=5e-3)
    assert Engine(ENGINE).vocabulary(out).has_tokenizer


def test_a_mixed_recipe_of_experts_is_written(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = make_tiny("qwen3moe", wide=True)
    fixture = tmp_path / "ids.json"
    save_fixture(from_ids(tiny.ids.tolist(), chunk=128), fixture)
    tensors = {"*ffn_down_exps*": "Q8_0", "*_exps*": "Q4_K", "token_embd.weight": "F16", "*": "Q6_K"}
    recipe = Recipe.model_validate({"name": "mixed", "tensors": tensors, "otherwise": "Q8_0"})
    record = run_recipes(request([recipe], checkpoint=tiny.folder, fixture=str(fixture), write=tmp_path / "mixed.gguf"))
    assert record.written is not None
    assert record.written.ppl == pytest.approx(record.rungs[0].statistics.ppl.value, rel=1e-7)


def test_what_cannot_be_written_is_said_before_any_forward(tmp_path: Path) -> None:
    said: list[str] = []
    for recipes in ([load_recipe("int4")], load_ladder("ggml"), []):
        with pytest.raises(BadInputError, match=r"simulated only|expected one recipe"):
            run_recipes(request(recipes, write=tmp_path / "x.gguf", say=said.append))
    with pytest.raises(SettingsError, match="none of 169 does"):
        run_recipes(request([Recipe(name="r", tensors={"*.qkv": "Q4_0"})], say=said.append))
    assert not said and not list(tmp_path.iterdir())


def test_fixtures_of_a_checkpoint_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint(EMBEDDED / "checkpoint")
    found = checkpoint_fixture(checkpoint, str(EMBEDDED / "heldout.txt"), 700)
    held_out = load_fixture(EMBEDDED / "heldout.json").first(700)
    assert (found.ids, found.adds_bos, found.bos_id) == (held_out.ids, held_out.adds_bos, held_out.bos_id)
    assert checkpoint_fixture(checkpoint, None, None).n_tokens == 512
    ids = tmp_path / "ids.json"
    save_fixture(from_ids([1, 2, 9999], chunk=8), ids)
    with pytest.raises(FixtureError, match="9999"):
        checkpoint_fixture(checkpoint, str(ids), None)
    folder = tmp_path / "bare"
    shutil.copytree(EMBEDDED / "checkpoint", folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FixtureError, match=r"no tokenizer\.json"):
        checkpoint_fixture(Checkpoint(folder), None, None)
    assert checkpoint_fixture(Checkpoint(folder), str(EMBEDDED / "heldout.json"), 64).n_tokens == 64
