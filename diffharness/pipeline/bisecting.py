"""`bisect`: an ordered list of engines, and the first with which verdict or numbers change.

Every engine that is looked at gets the same ids. Its native run gives the numbers, against those of the list's
first; a whole differential run gives its verdict, where verdicts are asked for. An engine that cannot be loaded,
or does not know the model, is skipped; one that dies over the tokens has the verdict `engine.crash`.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffharness.bisection import Found, bisect
from diffharness.captures import Capture
from diffharness.engine.runner import LOGITS_ONLY, Engine, EngineCrash, EngineRun, check_overrides
from diffharness.errors import BadInputError, EngineError, InconclusiveError
from diffharness.fixture import Fixture, save_fixture
from diffharness.legs.compare import logit_stats
from diffharness.metrics import compare_logits, nll_per_position, perplexity
from diffharness.pipeline import differential
from diffharness.pipeline.inputs import choose_fixture, open_artifact
from diffharness.pipeline.request import RunRequest, Say
from diffharness.pipeline.subjects import artifact_subject, fixture_subject
from diffharness.pipeline.timing import Timings
from diffharness.records.bisect import BisectRecord, StepRow
from diffharness.records.run import Divergence, VerdictKind
from diffharness.settings import EngineSettings, Tolerances
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.words import listed

On = Literal["verdict", "numbers", "either"]
FLOOR = "compare.nmse"


@dataclass(frozen=True)
class BisectRequest:
    """`engines` are words that `find` makes settings of. `floor` is a logits NMSE, None for the tolerances' own."""

    model: Path
    engines: Sequence[str]
    find: Callable[[str], EngineSettings]
    tolerances: Tolerances
    on: On = "either"
    floor: float | None = None
    skip_crash: bool = False
    fixture: str | None = None
    n_tokens: int | None = None
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)
    watch: Callable[[StepRow], None] = field(default=lambda step: None, repr=False)

    @property
    def nmse(self) -> float:
        """The floor in use."""
        return self.tolerances[FLOOR] if self.floor is None else self.floor


@dataclass(frozen=True)
class _Verdict:
    """What an engine's own run concludes; nothing where none was made."""

    kinds: list[VerdictKind] = field(default_factory=list)
    summary: str | None = None
    first_divergence: Divergence | None = None


def run(request: BisectRequest) -> BisectRecord:
    """The search and its record.

    Raises BadInputError for a list of fewer than two or for words that name no engine, InconclusiveError if the
    first engine does not run, since nothing can change from it then.
    """
    if len(request.engines) < 2:
        raise BadInputError(
            f"expected at least two engines to search between, found {len(request.engines)}",
            hint="diffharness bisect MODEL --engines OLDEST ... NEWEST",
        )
    check_overrides(request.overrides)
    timings = Timings()
    with timings.step("total"), tempfile.TemporaryDirectory(prefix="diffharness-") as folder:
        settings = [_settings(request, word) for word in request.engines]
        artifact = open_gguf(request.model) if request.on == "numbers" else open_artifact(request.model)
        with artifact:
            if isinstance(settings[0], EngineError):
                raise _no_first(request, settings[0].message)
            fixture, _ = choose_fixture(artifact, None, request.fixture, request.n_tokens, settings[0])
            search = _Search(request, settings, artifact, fixture, Path(folder))
            found = bisect(len(settings), search.has_changed)
            record = _record(request, artifact, fixture, search, found)
    record.timings = timings.seconds
    return record


def _settings(request: BisectRequest, word: str) -> EngineSettings | EngineError:
    """SettingsError passes: the word names nothing. An engine of another processor is there, but does not run."""
    try:
        return request.find(word)
    except EngineError as error:
        return error


class _Search:
    """The engines that were looked at so far, and the captures that they are compared by."""

    def __init__(
        self,
        request: BisectRequest,
        settings: Sequence[EngineSettings | EngineError],
        artifact: GgufFile,
        fixture: Fixture,
        folder: Path,
    ) -> None:
        self._request, self._settings, self._artifact, self._fixture = request, settings, artifact, fixture
        self._folder = folder
        self._ids = folder / "ids.json"
        save_fixture(fixture, self._ids)
        self._first_capture: Capture | None = None
        self.steps: list[StepRow] = []
        first = self._looked_at(0)
        if first.state == "skipped":
            raise _no_first(request, first.reason or "")
        self.first = first

    def has_changed(self, index: int) -> bool | None:
        """Whether the engine at a place of the list has changed from the first; None if it is skipped."""
        step = self._looked_at(index)
        return None if step.state == "skipped" else step.state == "changed"

    def _looked_at(self, index: int) -> StepRow:
        began = time.monotonic()
        self._request.say(f"engine {index} of {len(self._settings)}: {self._request.engines[index]}")
        step = self._step(index)
        step.seconds = time.monotonic() - began
        self.steps.append(step)
        self._request.watch(step)
        return step

    def _step(self, index: int) -> StepRow:
        settings = self._settings[index]
        step = StepRow(index=index, engine=self._request.engines[index], state="skipped")
        if isinstance(settings, EngineError):
            step.reason = settings.message
            return step
        native: EngineRun | None = None
        try:
            native = self._native(settings, index)
        except EngineCrash as crash:
            died = not crash.is_unusable and crash.phase == "eval" and not self._request.skip_crash
            if not died:
                step.reason = crash.message
                return step
            verdict = _Verdict(["engine.crash"], crash.message)
        else:
            self._measure(step, native, index)
            verdict = self._verdict(settings)
        step.verdicts, step.summary, step.first_divergence = verdict.kinds, verdict.summary, verdict.first_divergence
        self._judge(step, native, index)
        return step

    def _native(self, settings: EngineSettings, index: int) -> EngineRun:
        out = self._folder / ("first.safetensors" if index == 0 else "native.safetensors")
        return Engine(settings).capture(
            self._request.model, self._fixture.chunks(), out, taps=LOGITS_ONLY, overrides=self._request.overrides
        )

    def _measure(self, step: StepRow, native: EngineRun, index: int) -> None:
        """The build and the numbers of a native run."""
        info = native.info
        step.version, step.commit, step.bindings = info.get("version"), info.get("commit"), info.get("bindings")
        capture = native.open()
        if index == 0:
            self._first_capture = capture
        scored, logits = self._fixture.scored_positions(), capture.read("logits")
        step.ppl = perplexity(nll_per_position(logits[scored], self._fixture.next_ids()))
        first = self._first_capture
        if first is not None and first.read("logits").shape == logits.shape:
            step.logits = logit_stats(compare_logits(first.read("logits"), logits, scored))

    def _verdict(self, settings: EngineSettings) -> _Verdict:
        request = self._request
        if request.on == "numbers":
            return _Verdict()
        record = differential.run(
            RunRequest(
                model=request.model,
                engine=settings,
                tolerances=request.tolerances,
                fixture=str(self._ids),
                overrides=request.overrides,
                device=request.device,
                dtype=request.dtype,
                explain=False,  # says why, and changes no verdict
            )
        )
        return _Verdict(record.verdict.all, record.verdict.summary, record.first_divergence)

    def _judge(self, step: StepRow, native: EngineRun | None, index: int) -> None:
        """Set the state, and the reason where something changed."""
        if index == 0:
            step.state = "first"
            return
        first, request = self.first, self._request
        changes = []
        undecided = step.verdicts == ["inconclusive"] and first.verdicts != ["inconclusive"]
        # A death is a change of the verdict, whatever is asked for: there are no numbers to compare.
        if sorted(step.verdicts) != sorted(first.verdicts) and not undecided:
            was, now = (", ".join(kinds) or "no death" for kinds in (first.verdicts, step.verdicts))
            changes.append(f"the verdict was {was} and is {now}")
        if request.on != "verdict" and native is not None:
            if step.logits is None:
                changes.append("there are logits of another shape" if first.logits else "there are logits")
            elif not step.logits.nmse <= request.nmse:
                changes.append(f"logits NMSE {step.logits.nmse:.1e}, above {request.nmse:.0e}")
        if not changes and undecided:
            step.reason = step.summary
            return
        step.state = "changed" if changes else "same"
        step.reason = "; ".join(changes) or None


def _no_first(request: BisectRequest, reason: str) -> InconclusiveError:
    return InconclusiveError(
        f"the first engine, {request.engines[0]}, does not run: {reason}",
        hint="begin the list with an engine that loads the model: the others are compared with it",
    )


def _record(
    request: BisectRequest, artifact: GgufFile, fixture: Fixture, search: _Search, found: Found
) -> BisectRecord:
    names, candidates = request.engines, found.candidates
    whole = found.first_changed is None and found.last_same == len(names) - 1
    outcome: Literal["unchanged", "changed", "unclear"] = (
        "unchanged" if whole else "changed" if len(candidates) == 1 else "unclear"
    )
    next_step = None
    if found.first_changed is not None:
        pair = (names[found.last_same], names[found.first_changed])
        next_step = shlex.join(["diffharness", "run", str(request.model), "--engine", pair[0], "--engine", pair[1]])
    return BisectRecord(
        outcome=outcome,
        summary=_summary(request, search, found),
        engines=list(names),
        on=request.on,
        floor=request.nmse,
        steps=search.steps,
        first_changed=found.first_changed,
        last_same=found.last_same,
        candidates=candidates,
        artifact=artifact_subject(request.model, artifact),
        fixture=fixture_subject(fixture),
        next_step=next_step,
        repro=request.repro,
    )


def _summary(request: BisectRequest, search: _Search, found: Found) -> str:
    names = request.engines
    if found.first_changed is None:
        same = f"{names[found.last_same]} is the same as {names[0]}" if found.last_same else "nothing but the first ran"
        later = [names[i] for i in range(found.last_same + 1, len(names))]
        if later:
            return f"no change found: {same}, and what follows does not run: {listed(later)}."
        return f"no change: {same}; changes that were undone between them are not looked for."
    changed, last = names[found.first_changed], names[found.last_same]
    how = next(step.reason for step in search.steps if step.index == found.first_changed)
    if len(found.candidates) == 1:
        return f"first changed: {changed} ({last} was the last good): {how}."
    hidden = listed([names[i] for i in found.candidates[:-1]])
    between = f"{hidden} between them {'do' if len(found.candidates) > 2 else 'does'} not run"
    return f"changed between {last} and {changed}: {how}; which it was cannot be told, as {between}."
