"""The files of the cases: tiny checkpoints, clean quantizations of them, and damaged copies."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.confusion.cases import EMBEDDED, Base, Case, Weighting
from bench.confusion.lineage import trained
from diffharness.damage import Damage, Options, apply
from diffharness.engine.quantizer import Quantizer
from diffharness.engine.runner import Engine
from diffharness.fixture import from_ids, save_fixture
from diffharness.layers import parse_layers
from diffharness.settings import EngineSettings, data_dir
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_write import Bytes, RawTensor, write_tensors
from diffharness.weights.source import Float32Array, TensorInfo

_HOME = data_dir("fixtures") / "tiny-gemma4"
_FLOATS = ("F32", "F16", "BF16")
_MIXTURE = "mixture-"
_LOW = ("Q2_K", "Q3_K", "IQ")  # embeddings are kept better there, as llama.cpp's mixtures do


class Files:
    """Makes what is asked for in `folder`, once. `quantizer` is shared by all of them."""

    def __init__(self, folder: Path, quantizer: Quantizer, settings: EngineSettings) -> None:
        self.folder, self.quantizer, self.settings = folder, quantizer, settings
        self._checkpoints: dict[str, Path] = {EMBEDDED: _HOME / "checkpoint"}

    def checkpoint(self, model: str) -> Path:
        """The checkpoint that a model's files are made from."""
        if model not in self._checkpoints:
            if model.startswith(EMBEDDED):
                self._checkpoints[model] = trained(model)
            else:
                self._checkpoints[model] = self._tiny.checkpoint(model)
        return self._checkpoints[model]

    def claimed(self, model: str) -> Path:
        """The checkpoint that a model's files are judged by: of another lineage, not their own."""
        return self.checkpoint(EMBEDDED if model.startswith(EMBEDDED) else model)

    def fixture(self, model: str) -> Path:
        if model.startswith(EMBEDDED):
            return _HOME / "heldout.json"
        path = self.folder / f"{model}.ids.json"
        if not path.exists():
            save_fixture(from_ids(self._tiny.ids(model), name="random", chunk=128), path)
        return path

    @cached_property
    def _tiny(self) -> _Tiny:
        return _Tiny(self.folder)

    def clean(self, base: Base) -> Path:
        """The clean file, by ggml's quantizer."""
        out = self.folder / f"{base.label.replace(' ', '-')}.gguf"
        if not out.exists():
            with open_gguf(self._plain(base.model)) as plain:
                types = self._types(plain, base)
                if base.kind.startswith(_MIXTURE) and base.weighting == "none":
                    self._mixture(base).rename(out)
                else:
                    self._requantize(plain, out, types, base.weighting)
        return out

    def made(self, case: Case) -> tuple[Path, Damage | None]:
        """The case's file, and what was done to it."""
        source = self.clean(case.base)
        if not case.how and not case.set_keys:
            return source, None
        out = self.folder / "damaged.gguf"
        checkpoint = Checkpoint(self.checkpoint(case.base.model))
        layers = parse_layers(case.layers) if case.layers is not None else None
        try:
            done = apply(
                source,
                out,
                case.how,
                seed=case.seed,
                options=Options(tensors=case.tensors, layers=layers),
                # Damage happens to the values before they are quantized, with the weights that the file has.
                quantize=self._again(case.base.weighting),
                checkpoint=checkpoint,
                set_keys=case.set_keys,
            )
        finally:
            checkpoint.close()
        return out, done

    def _plain(self, model: str) -> Path:
        out = self.folder / f"{model}.f32.gguf"
        if not out.exists():
            checkpoint = Checkpoint(self.checkpoint(model))
            checkpoint_to_gguf(checkpoint, out)
            checkpoint.close()
        return out

    def _mixture(self, base: Base) -> Path:
        out = self.folder / f"{base.model}-{base.kind}.made.gguf"
        return Engine(self.settings).quantize(self._plain(base.model), out, base.kind.removeprefix(_MIXTURE))

    def _types(self, plain: GgufFile, base: Base) -> dict[str, str]:
        if base.kind.startswith(_MIXTURE):
            made = self._mixture(base)
            with open_gguf(made) as file:
                return {name: info.type for name, info in file.tensors.items()}
        return {name: _type_of(info, base.kind) for name, info in plain.tensors.items()}

    def _requantize(self, plain: GgufFile, out: Path, types: dict[str, str], weighting: Weighting) -> None:
        def data(info: TensorInfo) -> Callable[[], list[Bytes]]:
            def pieces() -> list[Bytes]:
                rows = plain.read(info.name).reshape(-1, info.shape[-1])
                weights = importance(info.name, info.shape[-1], weighting, types[info.name])
                return [self.quantizer.quantize(rows, types[info.name], weights)]

            return pieces

        tensors = [RawTensor(i.name, i.shape, types[i.name], data(i)) for i in plain.tensors.values()]
        write_tensors(out, plain.kv_raw(), tensors, plain.alignment)

    def _again(self, weighting: Weighting) -> Callable[[Float32Array, str], Bytes]:
        def quantize(rows: Float32Array, type_name: str) -> Bytes:
            weights = importance(f"{rows.shape}", rows.shape[1], weighting, type_name)
            return self.quantizer.quantize(rows, type_name, weights)

        return quantize


def importance(name: str, width: int, weighting: Weighting, type_name: str) -> Float32Array | None:
    """Weights by column as an importance matrix has them: mean squares of activations, widely spread."""
    if weighting == "none" or type_name in _FLOATS:
        return None
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.chisquare(1, width) + 1e-3 if weighting == "chi-square" else rng.lognormal(0, 1.5, width)
    return drawn.astype(np.float32)


def _type_of(info: TensorInfo, kind: str) -> str:
    if len(info.shape) == 1 or "ffn_gate_inp" in info.name:
        return "F32"
    if not info.name.startswith("blk.") and kind.startswith(_LOW):
        kind = "Q6_K"
    return kind if info.shape[-1] % BLOCKS[kind][0] == 0 else "Q8_0"


class _Tiny:
    """Random models of every architecture, by transformers, which is imported only where one is needed."""

    def __init__(self, folder: Path) -> None:
        from transformers.utils import logging

        from tests.oracles import tiny, tiny_gemma

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._folder = folder
        self._cases = {name: module for module in (tiny, tiny_gemma) for name in module.CASES}

    def checkpoint(self, model: str) -> Path:
        return Path(self._cases[model].build_checkpoint(model, self._folder / f"{model}.checkpoint", wide=True))

    def ids(self, model: str) -> list[int]:
        return list(self._cases[model].tokens(model).tolist())
