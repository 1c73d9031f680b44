"""The engine: evaluate tokens, tokenize, quantize, each call in a worker process.

A result is typed: an `EngineRun` with the capture's path, or an `EngineCrash` (crash.py) that says
how the engine died.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.captures import Capture
from diffharness.engine.crash import EngineCrash
from diffharness.engine.process import Progress, run_job
from diffharness.errors import BadInputError, SettingsError
from diffharness.settings import EngineSettings

__all__ = ["Engine", "EngineCrash", "EngineRun", "States", "Vocabulary", "check_overrides"]

# What `Engine.capture` may be asked for. Any tap takes the callback; logits alone are captured without it.
EVERY_TAP: None = None
LOGITS_ONLY: Sequence[str] = ()
RESIDUALS: Sequence[str] = ("token_embd", "blk.*.layer_out")  # enough to split the graph in every layer

# What llama_model_quantize refuses to make of a layer's tensor without an importance matrix.
NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

_OVERRIDE = re.compile(r"[^=]{1,127}=(int:-?\d+|float:\S+|bool:(true|false)|str:.{0,127})", re.S)


@dataclass(frozen=True)
class EngineRun:
    """A finished capture and what it took."""

    capture: Path | None  # None of a traced run
    taps: list[str]  # in graph order
    missing: list[str]  # patterns asked for that no node matched
    n_nodes: int  # of the graph; 0 if no callback was installed
    load_s: float
    eval_s: float
    info: dict[str, Any]
    settings: EngineSettings
    log: list[str] = field(repr=False, default_factory=list)

    def open(self) -> Capture:
        if self.capture is None:
            raise BadInputError("a traced run captures nothing")
        return Capture(self.capture)


@dataclass(frozen=True)
class States:
    """Hidden states to evaluate in the place of tokens: a tap [all tokens, width] of a capture, divided by `factor`."""

    capture: Path
    tap: str
    factor: float = 1.0

    def as_job(self) -> dict[str, Any]:
        """For the worker."""
        return {"capture": str(self.capture.absolute()), "tap": self.tap, "factor": self.factor}


@dataclass(frozen=True)
class Vocabulary:
    """What the model's own vocabulary says of itself."""

    n_vocab: int
    bos_id: int  # -1 for none
    eos_id: int
    adds_bos: bool
    has_tokenizer: bool
    pieces: dict[int, str]  # of the ids that were asked for


class Engine:
    """One llama.cpp build with one set of settings; every call is a process."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings

    def capture(
        self,
        model: str | os.PathLike[str],
        chunks: Sequence[Sequence[int] | NDArray[np.int64]],
        out: str | os.PathLike[str],
        *,
        taps: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
        meta: Mapping[str, str] | None = None,
        trace: bool = False,
        progress: Progress | None = None,
        states: States | None = None,
        first_layer: int = 0,
    ) -> EngineRun:
        """Evaluate each chunk from an empty cache; logits of every position and `taps` go to `out`.

        `taps` are names or shell patterns (`blk.*.layer_out`), None for all; with none at all no callback
        is installed. `overrides` are llama.cpp's `KEY=TYPE:VALUE`. With `states` their rows go in as the first layer's
        input, and tokens are only counted; taps are named as if the first layer were `first_layer`. Raises EngineCrash,
        OutputError.
        """
        out = Path(out).absolute()
        job = {
            "kind": "capture",
            "chunks": [[int(token) for token in chunk] for chunk in chunks],
            "out": str(out),
            "taps": None if taps is None else list(taps),
            "meta": dict(meta or {}),
            "trace": trace,
            "states": None if states is None else states.as_job(),
            "first_layer": first_layer,
        }
        try:
            result, log = self._run(job, model, overrides, progress)
        finally:
            # a worker that was killed could not tidy up
            out.with_name(out.name + ".part").unlink(missing_ok=True)
        return EngineRun(capture=None if trace else out, settings=self.settings, log=log, **result)

    def tokenize(
        self,
        model: str | os.PathLike[str],
        texts: Sequence[str],
        *,
        add_special: bool = True,
        parse_special: bool = True,
    ) -> list[list[int]]:
        """Ids of each text by the model's own vocabulary. Raises EngineCrash if it has no tokenizer."""
        job = {"kind": "tokenize", "texts": list(texts), "tokens": []}
        result, _ = self._run({**job, "add_special": add_special, "parse_special": parse_special}, model)
        ids: list[list[int]] = result["ids"]
        return ids

    def vocabulary(self, model: str | os.PathLike[str], tokens: Sequence[int] = ()) -> Vocabulary:
        """The vocabulary's size and special ids, and the pieces of `tokens`; also of a model without a tokenizer."""
        job = {"kind": "tokenize", "texts": [], "tokens": [int(token) for token in tokens]}
        result, _ = self._run(job, model)
        pieces = {int(token): piece for token, piece in result["pieces"].items()}
        names = ("n_vocab", "bos_id", "eos_id", "adds_bos", "has_tokenizer")
        return Vocabulary(pieces=pieces, **{name: result[name] for name in names})

    def info(self) -> dict[str, Any]:
        """What the engine says of itself: version, commit, system_info, devices, bindings, library, python."""
        return self._run({"kind": "info"})[0]

    def quantize_like(
        self,
        model: str | os.PathLike[str],
        out: str | os.PathLike[str],
        types: Mapping[str, str],
        uniform: Mapping[str, int] | None = None,
    ) -> Path:
        """Rewrite a GGUF with each tensor in the type that `types` gives by name, by llama.cpp's own quantizer.

        Tensors that are not named, and those that llama.cpp never quantizes (norms, routers), keep theirs.
        Types of `NEED_IMPORTANCE` are made only of tensors that `uniform` names, with row width times experts:
        those are quantized with every weight equally important.
        """
        patterns = {f"^{re.escape(name)}$": type_name for name, type_name in types.items()}
        return self._quantize(model, out, "Q8_0", patterns, uniform or {})

    def quantize(self, model: str | os.PathLike[str], out: str | os.PathLike[str], ftype: str) -> Path:
        """Rewrite a GGUF in one of llama.cpp's mixtures, such as `Q4_K_M`."""
        return self._quantize(model, out, ftype, {}, {})

    def _quantize(
        self,
        model: str | os.PathLike[str],
        out: str | os.PathLike[str],
        ftype: str,
        types: Mapping[str, str],
        uniform: Mapping[str, int],
    ) -> Path:
        path = Path(out).absolute()
        part = path.with_name(path.name + ".part")
        try:
            job = {"kind": "quantize_file", "out": str(part), "ftype": ftype, "types": dict(types)}
            self._run({**job, "uniform": dict(uniform), "threads": self.settings.threads}, model)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def _run(
        self,
        job: Mapping[str, Any],
        model: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> tuple[dict[str, Any], list[str]]:
        check_overrides(overrides)
        settings = self.settings.model_dump(mode="json")
        full = {**job, "settings": settings, "overrides": list(overrides)}
        if model is not None:
            full["model"] = str(Path(model).absolute())
        return run_job(self.settings, full, progress)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises SettingsError unless each is `KEY=TYPE:VALUE` in llama.cpp's syntax."""
    for text in overrides:
        if not _OVERRIDE.fullmatch(text) or not _is_number(text.partition("=")[2]):
            raise SettingsError(
                f"override {text!r} is not KEY=TYPE:VALUE",
                hint="TYPE is int, float, bool (true or false) or str: gemma3.attention.sliding_window=int:512",
            )


def _is_number(typed: str) -> bool:
    kind, _, value = typed.partition(":")
    if kind != "float":
        return kind != "int" or -(2**63) <= int(value) < 2**63
    try:
        float(value)
    except ValueError:
        return False
    return True
