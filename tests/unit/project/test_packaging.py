"""What the project promises about itself: the floors, the lock, the two commands of the README."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FLOORS = [
    "cli",
    "pytest_plugin",
    "farm",
    "manager",
    "lab",
    "conformance",
    "images",
    "guests",
    "hypervisors",
    "engine",
    "report",
    "machine",
]


ENGINE_ROOMS = [f"engine/{room}" for room in ("accel", "compile", "code", "cpu", "isa", "memory")]


def contracts() -> list[dict[str, object]]:
    return list(PYPROJECT["tool"]["importlinter"]["contracts"])


def test_every_floor_of_the_house_is_in_the_import_contract_in_order() -> None:
    floors = contracts()[0]
    assert floors["type"] == "layers"
    assert floors["containers"] == ["vmlab"]
    layers = floors["layers"]
    assert isinstance(layers, list)
    assert [layer.strip("()") for layer in layers] == FLOORS


def test_a_package_without_a_floor_is_refused() -> None:
    assert contracts()[0]["exhaustive"] is True
    assert contracts()[0]["exhaustive_ignores"] == ["__main__"]


@pytest.mark.parametrize(
    ("importer", "imported", "broken"),
    [
        ("machine", "vmlab.cli", "The floors"),
        ("hypervisors", "pytest", "Hypervisors know nothing"),
        ("hypervisors", "sqlite3", "Hypervisors know nothing"),
        ("hypervisors", "llvmlite", "llvmlite is imported"),
        ("engine", "vmlab.hypervisors", "The engine knows nothing"),
        ("engine/isa", "vmlab.engine.cpu", "The engine's rooms"),
        ("nowhere", "sys", "The floors"),
    ],
)
def test_an_import_upwards_breaks_the_contracts(
    importer: str, imported: str, broken: str, tmp_path: Path
) -> None:
    """A house of empty rooms, and one import that must not be."""
    for floor in [*FLOORS, *ENGINE_ROOMS, importer]:
        room = tmp_path / "vmlab" / floor
        room.mkdir(parents=True, exist_ok=True)
        (room / "__init__.py").write_text("")
    (tmp_path / "vmlab/__init__.py").write_text("")
    (tmp_path / "vmlab/__main__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

    def lint() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    if importer in (*FLOORS, *ENGINE_ROOMS):
        kept = lint()
        assert kept.returncode == 0, kept.stdout + kept.stderr
    (tmp_path / "vmlab" / importer / "__init__.py").write_text(f"import {imported}\n")
    done = lint()
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{broken}.* BROKEN", done.stdout), done.stdout


def locked() -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(
        r"^([\w.\-]+)==([\w.\-+]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    ):
        versions.setdefault(normalised(name), []).append(version)
    return versions


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_holds_every_dependency_of_every_extra() -> None:
    wanted = list(PYPROJECT["project"]["dependencies"])
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    wanted += PYPROJECT["build-system"]["requires"]
    # Each begins with a name.
    names = {normalised(re.match(r"[\w.\-]+", each)[0]) for each in wanted} - {"vmlab"}
    assert names <= locked().keys()


def test_every_heavy_extra_is_in_dev_so_that_the_lock_covers_it() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    [own] = [each for each in extras["dev"] if each.startswith("vmlab[")]
    named = set(own.removeprefix("vmlab[").removesuffix("]").split(","))
    assert named == extras.keys() - {"dev"}


def test_the_environment_is_the_lock_s() -> None:
    """Tests against other versions than the locked ones would prove something else."""
    lock = locked()
    for name in ("pydantic", "typer", "rich", "pytest", "hypothesis", "ruff", "mypy"):
        assert importlib.metadata.version(name) in lock[name], name


def test_the_readme_s_commands_are_targets_of_the_makefile() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    first_two = re.findall(r"^    make (\w+)", readme, re.MULTILINE)[:2]
    assert first_two == ["demo", "test"]
    mentioned = set(re.findall(r"`make (\w+)`", readme + (ROOT / "CONTRIBUTING.md").read_text()))
    assert mentioned | set(first_two) <= targets


def test_make_lists_every_target() -> None:
    listing = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in ("venv", "demo", "test", "lint", "bench", "soak", "docs", "lock", "coverage"):
        assert re.search(rf"^  make {target} +\S", listing, re.MULTILINE), target


def test_ci_lints_and_then_tests() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if line.startswith("make")]
    assert commands == ["make lint", "make test"]


def test_debian_packages_say_what_they_are_for() -> None:
    for line in (ROOT / "tools/debian-packages.txt").read_text().splitlines():
        if not line.startswith("#"):
            groups, package, purpose = line.split(maxsplit=2)
            assert set(groups.split(",")) <= {"test", "docs"}
            assert package
            assert len(purpose.split()) >= 3


def test_the_installed_package_brings_its_types_and_its_hypervisor() -> None:
    assert (ROOT / "src/vmlab/py.typed").is_file()
    points = importlib.metadata.entry_points(group="vmlab.hypervisors")
    assert points["simulated"].value == "vmlab.hypervisors.simulated:provider"
    assert points["embedded"].value == "vmlab.hypervisors.embedded:provider"
