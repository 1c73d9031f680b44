"""`diffharness doctor`: this machine, the packages, the engine build, and what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from diffharness import __version__
from diffharness.cli._options import EngineOption, JsonOption, VerboseOption
from diffharness.cli._output import emit, printing, result_console
from diffharness.errors import DiffharnessError
from diffharness.machine import Machine, free_disk, this_machine

# What the strict file of a 1B model takes; larger models need 4 bytes a parameter.
COMFORTABLE_DISK = 5_000_000_000


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` says how to get what is missing; None where nothing is."""

    what: str
    found: str
    fix: str | None = None
    essential: bool = True

    @property
    def ok(self) -> bool:
        return self.fix is None


def doctor(engine: EngineOption = None, json_file: JsonOption = None, verbose: VerboseOption = 0) -> None:
    """Show what this machine and engine build are, and what is missing.

    Exit code: 0 a run can be made; 1 something essential is missing.
    """
    machine = this_machine()
    build, engine_checks = _engine(engine)
    checks = [*package_checks(), *engine_checks, *machine_checks(machine)]
    ok = all(check.ok or not check.essential for check in checks)
    report = {
        "diffharness": __version__,
        "ok": ok,
        "machine": machine.as_dict(),
        "engine": build,
        "checks": [asdict(check) | {"ok": check.ok} for check in checks],
    }
    emit(json_file, json.dumps(report, indent=2))
    with printing():
        _print(machine, build, checks, ok, json_file)
    raise typer.Exit(0 if ok else 1)


def requirements() -> list[str]:
    """What this version of diffharness needs, as pip's requirement lines; optional ones left out."""
    try:
        lines = importlib.metadata.requires("diffharness") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        project = Path(__file__).parents[2] / "pyproject.toml"
        lines = tomllib.loads(project.read_text())["project"]["dependencies"] if project.exists() else []
    return [line for line in lines if "extra ==" not in line]


def package_checks() -> list[Check]:
    """Every package that is needed, its version here, and whether that will do."""
    from packaging.requirements import Requirement

    checks = []
    for requirement in sorted(map(Requirement, requirements()), key=lambda r: r.name.lower()):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        fix = f"python -m pip install '{requirement}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(requirement.name, "not installed", fix))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wants = "" if fits else f", expected {requirement.specifier}"
        checks.append(Check(requirement.name, f"{version}{wants}", None if fits else fix))
    return checks


def machine_checks(machine: Machine) -> list[Check]:
    """What of the machine can get in a run's way; none of it keeps a run from being tried."""
    amx = Check("AMX", "absent", essential=False)
    if machine.has_amx:
        amx = Check(
            "AMX",
            "present: on some machines llama.cpp's default path dies in ggml_backend_amx_mul_mat (SIGSEGV or SIGILL)",
            "nothing to do for `run`: it reports such a death and goes on with settings that survive; "
            "`extra_bufts: false` in a file for --engine keeps clear of it",
            essential=False,
        )
    place = Path(tempfile.gettempdir())
    free = free_disk(place)
    roomy = free >= COMFORTABLE_DISK
    disk = Check(
        "disk",
        f"{free / 1e9:.1f} GB free in {place}",
        None if roomy else "set TMPDIR to a roomier place: the strict file takes 4 bytes a parameter",
        essential=False,
    )
    return [amx, disk]


def _engine(name: str | None) -> tuple[dict[str, Any] | None, list[Check]]:
    """The engine build's own account of itself, and whether it loads."""
    from diffharness.builds import find_engine
    from diffharness.engine.runner import Engine
    from diffharness.settings import EngineSettings

    try:
        settings = find_engine(name) if name else EngineSettings()
        info: dict[str, Any] = Engine(settings).info()
    except DiffharnessError as error:
        return None, [Check("engine", error.message, error.hint or "reinstall llama-cpp-python")]
    return info, [Check("engine", "loads")]


def _print(
    machine: Machine, build: dict[str, Any] | None, checks: list[Check], ok: bool, json_file: Path | None
) -> None:
    from rich.table import Table

    console = result_console(json_file)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("machine", machine.cpu)
    facts.add_row("", " ".join(machine.flags) or "no flags known")
    facts.add_row("", f"{machine.cores} cores, {machine.memory_bytes / 1e9:.1f} GB of memory, {machine.system}")
    facts.add_row("python", machine.python)
    for key, value in (build or {}).items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip()
        facts.add_row(f"engine {key.replace('_', ' ')}", text)
    console.print(facts)

    table = Table("what", "found", "", box=None, pad_edge=False)
    for check in checks:
        state = "ok" if check.ok else ("[red]missing[/red]" if check.essential else "[yellow]note[/yellow]")
        table.add_row(check.what, check.found, state)
    console.print()
    console.print(table)
    console.print()
    for check in checks:
        if check.fix is not None:
            console.print(f"{check.what}: {check.fix}", markup=False)
    console.print("ready" if ok else "not ready: see above")
