"""`recipe`: a checkpoint under quantization recipes, simulated in the reference, against the checkpoint as it is.

No artifact is involved, and of the engine only its quantizer, where a recipe has types of ggml's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffharness import fixture as fixtures
from diffharness import kld
from diffharness.engine.quantizer import Quantizer
from diffharness.errors import BadInputError, FixtureError, SettingsError
from diffharness.fixture import Fixture
from diffharness.forensics.recipes import Plan, Recipe, Simulated, make_plan, write_recipe
from diffharness.kld import Series
from diffharness.pipeline import logit_series
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.inputs import DEFAULT_TEXT, DEFAULT_TOKENS
from diffharness.pipeline.logit_series import Places
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import Say
from diffharness.pipeline.subjects import checkpoint_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records.recipe import Baseline, RecipeRecord, Rung, Written
from diffharness.settings import EngineSettings
from diffharness.tokenizer import CheckpointTokenizer
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import gguf_metadata
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import EMBEDDING, TensorInfo


@dataclass(frozen=True)
class RecipeRequest:
    """One ladder. `write` takes exactly one recipe; `engine` says whose quantizer is used."""

    checkpoint: Path
    recipes: Sequence[Recipe]
    engine: EngineSettings
    ladder: str | None = None
    optional: frozenset[str] = frozenset()  # recipes that are left out where they do not fit the model
    fixture: str | None = None
    n_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    write: Path | None = None
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)


def run_recipes(request: RecipeRequest) -> RecipeRecord:
    """Grade the checkpoint, then each recipe against it; with `request.write`, write the recipe and read it back.

    Everything that can be wrong with the recipes is found before the first forward. Raises BadInputError, and
    EngineError where ggml's quantizer does not make what a recipe asks for.
    """
    timings = Timings()
    if request.write is not None and len(request.recipes) != 1:
        raise BadInputError(
            f"expected one recipe to write, found {len(request.recipes)}", hint="name it with --recipe NAME"
        )
    with timings.step("total"):
        checkpoint = Checkpoint(request.checkpoint, threads=torch.get_num_threads())
        try:
            record = _run(request, checkpoint, timings)
        finally:
            checkpoint.close()
    record.timings = timings.seconds
    return record


def _run(request: RecipeRequest, checkpoint: Checkpoint, timings: Timings) -> RecipeRecord:
    plans, left_out = _plans(request, checkpoint)
    if request.write is not None and plans[0].simulated_only:
        raise BadInputError(
            f"recipe {plans[0].recipe.name} is simulated only: no GGUF holds what it makes of "
            f"{plans[0].simulated_only[0]}",
            hint="to write a file, take a recipe of ggml types, such as Q4_0",
        )
    fixture = checkpoint_fixture(checkpoint, request.fixture, request.n_tokens)
    precision, places = Precision(request.dtype, request.device), Places.of(fixture)
    scored = places.scored
    written = None
    with run_folder(None) as folder, Quantizer(request.engine) as quantizer:
        with timings.step("checkpoint"):
            request.say(f"reference on {checkpoint.label}")
            base, own = logit_series.of_base(checkpoint, fixture, places, precision, folder / "checkpoint.safetensors")
        rungs = []
        for plan in plans:
            with timings.step(plan.recipe.name):
                request.say(f"recipe {plan.recipe.name}: {plan.recipe.about}")
                source = Simulated(checkpoint, plan, quantizer.quantize)
                series = logit_series.of_reference(source, fixture, places, precision, base)
                rungs.append(_rung(plan, series.at(scored)))
        if request.write is not None:
            with timings.step("write"):
                request.say(f"writing {request.write}")
                write_recipe(request.write, checkpoint, plans[0], quantizer.quantize, gguf_metadata(checkpoint))
            with timings.step("read back"):
                request.say(f"reference on {request.write}")
                written = _read_back(request.write, plans[0].recipe.name, fixture, places, precision)
    return RecipeRecord(
        ladder=request.ladder,
        baseline=_baseline(checkpoint.tensors.values(), own.at(scored)),
        rungs=rungs,
        left_out=left_out,
        written=written,
        checkpoint=checkpoint_subject(request.checkpoint, checkpoint),
        fixture=fixture_subject(fixture),
        machine=machine_subject(),
        repro=request.repro,
    )


def _plans(request: RecipeRequest, checkpoint: Checkpoint) -> tuple[list[Plan], dict[str, str]]:
    """Recipes laid out on the checkpoint, and why optional ones are not. Raises SettingsError where none is left."""
    plans, left_out = list[Plan](), dict[str, str]()
    for recipe in request.recipes:
        try:
            plans.append(make_plan(recipe, checkpoint.tensors))
        except SettingsError as error:
            last = recipe is request.recipes[-1]
            if recipe.name not in request.optional or (last and not plans):
                raise
            left_out[recipe.name] = error.message
    return plans, left_out


def checkpoint_fixture(checkpoint: Checkpoint, name: str | None, n_tokens: int | None) -> Fixture:
    """The fixture's first tokens, fit for a checkpoint without an artifact; a text is tokenized by `tokenizer.json`.

    Raises FixtureError where it does not fit, or where there is a text and nothing to make tokens of it with.
    """
    path = fixtures.resolve(name or DEFAULT_TEXT)
    tokenizer = CheckpointTokenizer(checkpoint.tokenizer_path) if checkpoint.tokenizer_path is not None else None
    if path.suffix == ".json":
        found = fixtures.load_fixture(path)
        if tokenizer is not None:
            found.check_tokenizer("tokenizer.json", tokenizer.sha256, tokenizer.label)
    elif tokenizer is not None:
        found = fixtures.from_text(
            fixtures.read_text(path),
            tokenizer.encode,
            name=path.stem,
            tokenizer_kind="tokenizer.json",
            tokenizer_sha256=tokenizer.sha256,
            provenance={"text": path.name, "tokenizer": tokenizer.label},
        )
    else:
        raise FixtureError(
            f"{checkpoint.label} has no tokenizer.json to make tokens of the text {path.name} with",
            hint="give a fixture of ids (--fixture FILE.json), or download tokenizer.json",
        )
    found = found.first(n_tokens if n_tokens is not None else min(len(found.ids), max(DEFAULT_TOKENS, found.chunk)))
    found.check_vocab(checkpoint.tensors[EMBEDDING].shape[0])
    context = checkpoint.metadata.get(f"{checkpoint.arch}.context_length")
    if isinstance(context, int):
        found.check_context(context)
    return found


def _baseline(tensors: Iterable[TensorInfo], series: Series) -> Baseline:
    stored = list(tensors)
    n_params, n_bytes = sum(info.n_elements for info in stored), sum(info.n_bytes for info in stored)
    return Baseline(
        ppl=kld.perplexity(series.nll), bits_per_weight=8 * n_bytes / n_params, n_bytes=n_bytes, n_params=n_params
    )


def _rung(plan: Plan, series: Series) -> Rung:
    return Rung(
        name=plan.recipe.name,
        about=plan.recipe.about,
        bits_per_weight=plan.bits_per_weight,
        n_bytes=round(plan.n_bits / 8),
        schemes=plan.schemes,
        fell_back=plan.fell_back,
        can_be_written=not plan.simulated_only,
        statistics=kld.statistics(series),
    )


def _read_back(path: Path, recipe: str, fixture: Fixture, places: Places, precision: Precision) -> Written:
    with open_gguf(path) as artifact:
        series = logit_series.of_reference(artifact, fixture, places, precision, None).at(places.scored)
        return Written(
            path=str(path),
            recipe=recipe,
            sha256=artifact.sha256(),
            n_bytes=artifact.n_bytes,
            ppl=kld.perplexity(series.nll).value,
        )
