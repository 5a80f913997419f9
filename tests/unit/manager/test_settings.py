"""Settings of the manager: from the environment, checked, refused by the name that was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec
from vmlab.manager.settings import Settings


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


def test_without_an_environment_everything_has_a_value(home: Home) -> None:
    settings = Settings.from_environment({}, home=home)
    assert (settings.database_url, settings.dry_run, settings.power_safe) == (None, False, False)
    assert (settings.workers, settings.sweep_seconds, settings.stop_seconds) == (4, 5.0, 30.0)
    assert settings.limits.memory is None
    assert settings.directory == home.directory / "manager"
    assert settings.directory.stat().st_mode & 0o777 == 0o700


def test_environment_is_read_and_arguments_have_precedence(home: Home) -> None:
    environment = {
        "VMLAB_WORKERS": "8",
        "VMLAB_DRY_RUN": "1",
        "VMLAB_POWER_SAFE": "true",
        "VMLAB_SWEEP_SECONDS": "0.5",
        "VMLAB_LIMIT_MEMORY": "4G",
        "VMLAB_LIMIT_VCPUS": "16",
        "VMLAB_EVENTS_KEPT": "",
        "VMLAB_DATABASE_URL": "postgresql:///vmlab",
    }
    settings = Settings.from_environment(environment, home=home, sweep_seconds=2)
    assert (settings.workers, settings.dry_run, settings.power_safe) == (8, True, True)
    assert (settings.sweep_seconds, settings.events_kept) == (2, 100_000)
    assert (settings.limits.memory, settings.limits.vcpus) == (4 << 30, 16)
    assert settings.database_url == "postgresql:///vmlab"


def test_home_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "mine"))
    assert Settings.from_environment().home.directory == tmp_path / "mine"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VMLAB_WORKERS", "0"),
        ("VMLAB_WORKERS", "many"),
        ("VMLAB_DRY_RUN", "perhaps"),
        ("VMLAB_LIMIT_MEMORY", "4 bananas"),
        ("VMLAB_SWEEP_SECONDS", "-1"),
    ],
)
def test_value_that_cannot_be_is_refused_by_the_name_of_its_variable(
    home: Home, variable: str, value: str
) -> None:
    with pytest.raises(InvalidSpec) as error:
        Settings.from_environment({variable: value}, home=home)
    (problem,) = error.value.problems
    assert problem.field == variable
    assert problem.expected
    assert value in str(error.value)


def test_argument_that_cannot_be_is_refused_by_its_own_name(home: Home) -> None:
    with pytest.raises(InvalidSpec) as error:
        Settings.from_environment({}, home=home, wrokers=3)
    assert error.value.problems[0].field == "wrokers"
