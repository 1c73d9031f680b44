"""Engine settings and tolerances: YAML under configs/, checked on reading.

Every field has one place where it is explained (configs/engines/example.yaml) and one default, which
is llama.cpp's own. A key that is not known is an error, never ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffharness.errors import SettingsError
from diffharness.machine import usable_cores

M = TypeVar("M", bound=BaseModel)
PLAIN_KV = ("F32", "F16", "BF16")

KvType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"]
Count = Annotated[int, Field(ge=1, le=1 << 20)]


class EngineSettings(BaseModel):
    """One way to run one llama.cpp build. The defaults are what a user of llama.cpp's tools gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "native"
    flash_attn: Literal["auto", "on", "off"] = "auto"
    type_k: KvType = "F16"
    type_v: KvType = "F16"
    n_batch: Count = 2048
    n_ubatch: Count = 512
    threads: Count = Field(default_factory=usable_cores)
    extra_bufts: bool = True  # weight repacking and AMX
    n_gpu_layers: int = -1  # -1: all
    op_offload: bool = True  # large products on a device even where the weights are on the host
    swa_full: bool = False
    n_seq_max: Annotated[int, Field(ge=1, le=64)] = 1
    kv_unified: bool = False
    rope_freq_base: float | None = None  # None of these: as the model says
    rope_freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None
    use_mmap: bool = True
    lib_dir: Path | None = None
    python: Path | None = None
    time_limit_s: float = Field(default=3600.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _yaml_words(cls, data: Any) -> Any:
        """YAML 1.1 reads `on` and `off` as booleans, and types may be written in either case."""
        if not isinstance(data, Mapping):
            return data
        words = dict(data)
        if isinstance(words.get("flash_attn"), bool):
            words["flash_attn"] = "on" if words["flash_attn"] else "off"
        for key in ("type_k", "type_v"):
            if isinstance(words.get(key), str):
                words[key] = words[key].upper()
        return words

    @model_validator(mode="after")
    def _fit(self) -> EngineSettings:
        if self.n_ubatch > self.n_batch:
            raise ValueError(f"n_ubatch {self.n_ubatch} is larger than n_batch {self.n_batch}")
        if self.type_v not in PLAIN_KV and self.flash_attn == "off":
            raise ValueError(f"type_v {self.type_v} needs flash attention: llama.cpp refuses it without")
        return self

    def changed(self, **changes: Any) -> EngineSettings:
        """These settings with some replaced, checked again."""
        return EngineSettings.model_validate({**self.model_dump(), **changes})

    def differences(self, other: EngineSettings) -> dict[str, Any]:
        """Fields in which `other` differs, with its values; the name does not count."""
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return {key: theirs[key] for key in mine if key != "name" and mine[key] != theirs[key]}


class Floor(BaseModel):
    """What a number may be at most, and the measurement that says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(ge=0)
    measured: str = Field(min_length=1)


class Floors(Protocol):
    """What a comparison asks of the tolerances; `Tolerances` and a plain dict both answer."""

    def __getitem__(self, name: str, /) -> float: ...

    def get(self, name: str, default: float, /) -> float: ...


class Tolerances(BaseModel):
    """Floors by name: `tolerances["graph.local"]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    floors: dict[str, Floor]

    def __getitem__(self, name: str) -> float:
        """The floor of that name; SettingsError if there is none."""
        floor = self.floors.get(name)
        if floor is None:
            raise SettingsError(f"no tolerance is called {name}", hint=f"known: {', '.join(sorted(self.floors))}")
        return floor.value

    def __contains__(self, name: object) -> bool:
        return name in self.floors

    def get(self, name: str, default: float) -> float:
        """The floor of that name, or `default` where an override is optional."""
        return self.floors[name].value if name in self.floors else default


def data_dir(name: str) -> Path:
    """`configs` or `fixtures`: beside the package in a checkout, inside of it when installed."""
    package = Path(__file__).resolve().parent
    is_checkout = (package.parent / "pyproject.toml").is_file()
    folder = package.parent / name if is_checkout else package / "_data" / name
    if folder.is_dir():
        return folder
    raise SettingsError(f"no {name} folder beside or inside of {package}", hint="install diffharness again")


def configs_dir() -> Path:
    """The folder of tolerances, engine settings and the like."""
    return data_dir("configs")


def engine_names() -> list[str]:
    """Names under configs/engines."""
    return sorted(path.stem for path in (configs_dir() / "engines").glob("*.yaml"))


def load_engine(name_or_path: str | os.PathLike[str]) -> EngineSettings:
    """Settings by their name under configs/engines, or from a YAML file; `name` defaults to the file's stem."""
    path = Path(name_or_path)
    named = configs_dir() / "engines" / f"{path}.yaml"
    if path.suffix not in (".yaml", ".yml") and path.name == str(name_or_path):
        if not named.exists():
            known = ", ".join(engine_names())
            raise SettingsError(f"no engine settings are called {name_or_path}", hint=f"known: {known}; or give a file")
        path = named
    data = _read_yaml(path, hint="configs/engines/example.yaml shows the form of engine settings")
    settings: EngineSettings = _validated(EngineSettings, {"name": path.stem, **data}, path)
    # paths in a file are meant from where the file is
    return settings.changed(
        **{key: _resolved(value, path.parent) for key in ("lib_dir", "python") if (value := getattr(settings, key))}
    )


def load_tolerances(path: str | os.PathLike[str] | None = None) -> Tolerances:
    """The floors of configs/tolerances.yaml, or of another file of the same form."""
    file = Path(path) if path is not None else configs_dir() / "tolerances.yaml"
    tolerances: Tolerances = _validated(Tolerances, _read_yaml(file), file)
    return tolerances


def load_yaml(model: type[M], path: Path, **defaults: Any) -> M:
    """A YAML file as a pydantic model; `defaults` stand for keys that it lacks. SettingsError if it is not valid."""
    loaded: M = _validated(model, {**defaults, **_read_yaml(path)}, path)
    return loaded


def _resolved(value: Path, base: Path) -> Path:
    # not resolve(): a virtual environment's python is a link, and only the link knows its packages
    return Path(os.path.abspath(base / value.expanduser()))


def _read_yaml(path: Path, hint: str | None = None) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise SettingsError(f"cannot read {path}: {err.strerror}", hint="check the path") from err
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        mark = getattr(err, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(err, "problem", None) or str(err).splitlines()[0]
        raise SettingsError(f"{path} is not YAML{where}: {what}", hint=hint) from err
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds a {type(data).__name__}, a mapping was expected", hint=hint)
    return {str(key): value for key, value in data.items()}


def _validated(model: type[Any], data: dict[str, Any], path: Path) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as err:
        first = err.errors()[0]
        # pydantic puts the names of its own validators among the keys, and its own words before ours
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "the file"
        hint = "configs/engines/example.yaml explains each setting" if model is EngineSettings else None
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = f"; known: {', '.join(sorted(model.model_fields))}" if len(first["loc"]) == 1 else ""
            what = f"no such setting{known}"
        raise SettingsError(f"{path}: {where}: {what}", hint=hint) from err
