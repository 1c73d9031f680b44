"""The files behind MODEL: paths, the Hugging Face hub, and the model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from diffharness.errors import BadInputError


class Embedded(NamedTuple):
    """The model that ships with the package."""

    model: Path
    checkpoint: Path
    fixture: str


def embedded() -> Embedded:
    """What a command runs on where the caller names nothing else."""
    from diffharness.settings import data_dir

    folder = data_dir("fixtures") / "tiny-gemma4"
    return Embedded(folder / "tiny-gemma4-Q4_K_M.gguf", folder / "checkpoint", str(folder / "heldout.json"))


class Inputs(NamedTuple):
    """What a command was given to run on."""

    model: Path
    checkpoint: Path | None
    fixture: str | None


def inputs(model: str | None, fixture: str | None, checkpoint: Path | None = None) -> Inputs:
    """The files behind the arguments; without MODEL the embedded model, and what is not named comes with it."""
    if model is not None:
        return Inputs(model_path(model), checkpoint, fixture)
    own = embedded()
    return Inputs(own.model, checkpoint or own.checkpoint, fixture or own.fixture)


def model_path(model: str) -> Path:
    """The file behind MODEL: a path as it is, `hf://owner/repo[@revision]/file.gguf` through huggingface_hub.

    Of a split file (`-00001-of-0000N`) all parts are fetched. BadInputError if it cannot be had.
    """
    if not model.startswith("hf://"):
        return Path(model)
    parts = model.removeprefix("hf://").split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise BadInputError(
            f"expected hf://owner/repo/file.gguf, found {model}", hint="name the file in the repository, or give a path"
        )
    owner, name, file = parts
    name, _, revision = name.partition("@")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(f"{owner}/{name}", part, revision=revision or None) for part in split_parts(file)]
    except LocalEntryNotFoundError as error:  # before its base class: no network, or offline mode
        raise BadInputError(
            f"{model} is not in the local cache, and {_no_hub()}",
            hint="download the file and give its path; HF_HOME and HF_HUB_CACHE say where the cache is",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BadInputError(
            f"cannot get {model}: {str(error).strip().splitlines()[0]}",
            hint="check owner, repo and file; for a private one, log in with `hf auth login`",
        ) from error
    return Path(paths[0])


def _no_hub() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "HF_HUB_OFFLINE forbids to fetch it" if HF_HUB_OFFLINE else "the hub cannot be reached"


def split_parts(file: str) -> list[str]:
    """Every part's name of a split GGUF, first part first; `[file]` where it is not split."""
    stem, dash, count = file.removesuffix(".gguf").rpartition("-of-")
    if not dash or not count.isdigit() or not stem[-5:].isdigit():
        return [file]
    return [f"{stem[:-5]}{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1)]
