"""What the manager is told about itself: where it keeps things, how much it may use.

Read from the environment (`VMLAB_...`) or given by whoever makes it; nothing here is kept in the
store. A value that cannot work is refused by the name that the person wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import Name
from vmlab.machine.problems import invalid
from vmlab.machine.sizes import Size
from vmlab.manager.requests import Policy

__all__ = ["VARIABLES", "HostSetting", "Limits", "Settings"]


class Limits(BaseModel):
    """How much all machines together may take; what is None is limited by the host alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vcpus: int | None = Field(None, ge=1, description="number of vCPUs of all live machines")
    memory: Size | None = Field(None, description='memory of all live machines: bytes, or "16G"')
    disk: Size | None = Field(None, description='sizes of all disks of the store: bytes, or "1T"')
    machines: int | None = Field(None, ge=1, description="number of machines that are there")


class HostSetting(BaseModel):
    """Where machines may run: a hypervisor with its options, under a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(description="name of the host")
    hypervisor: str = Field(min_length=1, description="name of its hypervisor")
    options: dict[str, str] = Field(default_factory=dict, description="what it is opened with")


class Settings(BaseModel):
    """How a manager works. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    home: Home
    database_url: str | None = Field(
        None, description='database, such as "postgresql://user@host/vmlab"; SQLite if left out'
    )
    power_safe: bool = Field(
        False,
        description="wait for the disk at each change, so that a power failure loses nothing",
    )
    dry_run: bool = Field(False, description="say what would be done and touch nothing")
    workers: int = Field(4, ge=1, le=256, description="number of operations that run at once")
    sweep_seconds: float = Field(5.0, gt=0, description="seconds between sweeps of the observer")
    stop_seconds: float = Field(30.0, gt=0, description="seconds that a guest has to shut down")
    limits: Limits = Field(default_factory=Limits)
    hosts: tuple[HostSetting, ...] | None = Field(
        None,
        min_length=1,
        description='where machines may run, as JSON: [{"name": ..., "hypervisor": ..., '
        '"options": {...}}]; each hypervisor that works here if left out',
    )
    rate_limit: float | None = Field(
        None, gt=0, description="requests per second of one client; no limit if left out"
    )
    events_kept: int = Field(100_000, ge=1, description="number of events that can be replayed")
    operations_kept: int = Field(
        50_000, ge=1, description="number of ended operations that are kept"
    )
    findings_kept: int = Field(
        10_000, ge=1, description="number of resolved findings that are kept"
    )
    findings: dict[str, Policy] = Field(
        default_factory=dict,
        description='what is done about findings, by code: "CODE=POLICY,CODE=POLICY"; those left '
        "out are reported",
    )

    @field_validator("findings", mode="before")
    @classmethod
    def _read_policies(cls, value: object) -> object:
        # The observer's codes are known where they are used.
        from vmlab.manager.observer.policies import read_policies

        return read_policies(value)

    @field_validator("hosts", mode="before")
    @classmethod
    def _read_hosts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"a list of hosts as JSON ({error})") from None

    @field_validator("hosts")
    @classmethod
    def _no_twins(cls, value: tuple[HostSetting, ...] | None) -> tuple[HostSetting, ...] | None:
        names = [host.name for host in value or ()]
        if len(set(names)) < len(names):
            raise ValueError("hosts with a name of its own each")
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Self:
        """Settings as the environment has them; `given` has precedence.

        Raises:
            InvalidSpec: a variable or an argument is no value of its setting.
            VmlabError: the home cannot be used.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        limits: dict[str, Any] = {}
        for variable, field in VARIABLES.items():
            text = environment.get(variable)
            if not text:
                continue
            if field.startswith("limits."):
                limits[field.removeprefix("limits.")] = text
            else:
                values[field] = text
        if limits:
            values["limits"] = limits
        values.update(given)
        if "home" not in values:
            values["home"] = Home.open()
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InvalidSpec(
                [
                    SpecProblem(_variable(problem.field), problem.value, problem.expected)
                    for problem in invalid(error, cls).problems
                ],
                what="settings of the manager",
                operation="open the manager",
            ) from None

    @property
    def directory(self) -> Path:
        """Where the manager keeps all that is its own; made, for its user alone, if missing."""
        directory = self.home.directory / "manager"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory


VARIABLES: Final = {
    "VMLAB_DATABASE_URL": "database_url",
    "VMLAB_POWER_SAFE": "power_safe",
    "VMLAB_DRY_RUN": "dry_run",
    "VMLAB_WORKERS": "workers",
    "VMLAB_SWEEP_SECONDS": "sweep_seconds",
    "VMLAB_STOP_SECONDS": "stop_seconds",
    "VMLAB_RATE_LIMIT": "rate_limit",
    "VMLAB_EVENTS_KEPT": "events_kept",
    "VMLAB_OPERATIONS_KEPT": "operations_kept",
    "VMLAB_FINDINGS_KEPT": "findings_kept",
    "VMLAB_HOSTS": "hosts",
    "VMLAB_FINDINGS": "findings",
    "VMLAB_LIMIT_VCPUS": "limits.vcpus",
    "VMLAB_LIMIT_MEMORY": "limits.memory",
    "VMLAB_LIMIT_DISK": "limits.disk",
    "VMLAB_LIMIT_MACHINES": "limits.machines",
}
"""Which setting a variable of the environment is; docs/reference/manager.md tells of all."""


def _variable(field: str) -> str:
    """The variable that a setting comes from; the setting itself if there is none."""
    return next((name for name, setting in VARIABLES.items() if setting == field), field)
