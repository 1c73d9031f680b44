"""Engine settings and tolerances from YAML: defaults are llama.cpp's, anything unknown is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffharness import settings
from diffharness.errors import SettingsError
from diffharness.settings import EngineSettings, data_dir, engine_names, load_engine, load_tolerances


def test_shipped_engines_load() -> None:
    assert {"native", "strict", "example"} <= set(engine_names())
    for name in engine_names():
        assert load_engine(name).name == name


def test_example_states_every_field_with_its_default() -> None:
    text = (settings.configs_dir() / "engines" / "example.yaml").read_text()
    for field in EngineSettings.model_fields.keys() - {"name"}:
        assert f"\n{field}:" in text or f"\n# {field}:" in text, field
    assert load_engine("example").differences(EngineSettings()) == {}


def test_strict_removes_noise() -> None:
    strict = load_engine("strict")
    assert (strict.flash_attn, strict.type_k, strict.type_v, strict.extra_bufts) == ("off", "F32", "F32", False)


def test_words_of_yaml_and_either_case(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("flash_attn: on\ntype_k: q8_0\ntype_v: q4_0\n")
    mine = load_engine(path)
    assert (mine.name, mine.flash_attn, mine.type_k, mine.type_v) == ("mine", "on", "Q8_0", "Q4_0")


def test_paths_are_meant_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("lib_dir: build/bin\npython: ../python\n")
    mine = load_engine(tmp_path / "e.yaml")
    assert mine.lib_dir == tmp_path / "build" / "bin" and mine.python == tmp_path.parent / "python"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flash_atn: on", "flash_atn"),
        ("type_k: Q4_K", "type_k"),
        ("threads: 0", "threads"),
        ("threads: many", "threads"),
        ("n_batch: 64\nn_ubatch: 128", "larger than n_batch"),
        ("flash_attn: off\ntype_v: Q8_0", "needs flash attention"),
        ("- a", "a mapping was expected"),
        ("a: [", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(SettingsError, match=says):
        load_engine(tmp_path / "e.yaml")


def test_unknown_names() -> None:
    with pytest.raises(SettingsError, match="no engine settings are called") as caught:
        load_engine("natvie")
    assert "native" in str(caught.value)
    with pytest.raises(SettingsError, match="cannot read"):
        load_engine("absent/e.yaml")


def test_changes_are_checked_and_told() -> None:
    native = EngineSettings(threads=2)
    changed = native.changed(threads=1, extra_bufts=False)
    assert native.differences(changed) == {"threads": 1, "extra_bufts": False}
    with pytest.raises(ValueError, match="threads"):
        native.changed(threads=0)


def test_shipped_tolerances_load_and_unknown_names_are_refused() -> None:
    tolerances = load_tolerances()
    raw = yaml.safe_load((data_dir("configs") / "tolerances.yaml").read_text())
    assert {name: tolerances[name] for name in raw["floors"]} == {n: f["value"] for n, f in raw["floors"].items()}
    assert "graph.local" in tolerances and tolerances.get("graph.local.none", 5.0) == 5.0
    with pytest.raises(SettingsError, match=r"no tolerance is called graph\.locl"):
        tolerances["graph.locl"]


@pytest.mark.parametrize(
    "text", ["floors: {a: {value: -1, measured: x}}", "floors: {a: {value: 1}}", "floors: {a: 1}", "flors: {}", "{}"]
)
def test_malformed_tolerances(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"t\.yaml"):
        load_tolerances(tmp_path / "t.yaml")


def test_data_beside_a_checkout_or_inside_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "diffharness"
    (package / "_data" / "configs").mkdir(parents=True)
    (tmp_path / "site-packages" / "configs").mkdir()  # somebody else's
    monkeypatch.setattr(settings, "__file__", str(package / "settings.py"))
    assert data_dir("configs") == package / "_data" / "configs"
    with pytest.raises(SettingsError, match="no fixtures folder"):
        data_dir("fixtures")
    (tmp_path / "site-packages" / "pyproject.toml").touch()
    assert data_dir("configs") == tmp_path / "site-packages" / "configs"
