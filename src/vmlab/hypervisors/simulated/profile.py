"""What a simulated hypervisor is like: latencies, limits, luck, and what it cannot do.

Built-in profiles are `standard`, `performance` and `unreliable`; a TOML file can start from one of
them (`extends = "standard"`) and change some fields. All durations are seconds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability, Limits
from vmlab.machine.documents import build
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.faults import FaultSchedule
from vmlab.machine.sizes import GIB, TIB

ANY: Final = "any"
OPERATION_NAMES: Final = frozenset(DEFAULT_TIMEOUTS)
"""The operations that latencies and rates can be given for."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latencies(_Part):
    """Seconds that operations take, each varied evenly by `variability` of it."""

    variability: float = Field(0.2, ge=0, lt=1, description="share: 0.2 is +-20%")
    create: float = Field(0.1, ge=0)
    start: float = Field(2.0, ge=0, description="boot; a reset and a restart take it too")
    stop: float = Field(1.0, ge=0, description="graceful shutdown by the guest")
    kill: float = Field(0.05, ge=0)
    pause: float = Field(0.02, ge=0)
    resume: float = Field(0.02, ge=0)
    delete: float = Field(0.1, ge=0)
    status: float = Field(0.01, ge=0, description="every question: status, info, metrics, ...")
    network: float = Field(0.005, ge=0, description="a change of the network")
    disk: float = Field(0.05, ge=0, description="a change of a disk")
    snapshot: float = Field(0.2, ge=0)
    restore: float = Field(0.2, ge=0)
    fork: float = Field(0.02, ge=0)
    resize: float = Field(0.05, ge=0, description="vCPUs, memory and pinning")
    fault: float = Field(0.001, ge=0, description="injecting and clearing one")
    migration: float = Field(0.01, ge=0, description="for each MiB that is sent")


LATENCY_OF: Final[Mapping[str, str]] = {
    **dict.fromkeys(("status", "info", "metrics", "console", "channel", "snapshots"), "status"),
    **dict.fromkeys(("screenshot", "send_keys"), "status"),
    **dict.fromkeys(("plug_nic", "unplug_nic"), "network"),
    **dict.fromkeys(("plug_disk", "unplug_disk", "resize_disk"), "disk"),
    **dict.fromkeys(("inject", "clear_fault"), "fault"),
    "create_from": "restore",
    "delete_snapshot": "disk",
    "pin": "resize",
    "restart": "start",
    "migrate": "network",
}
"""The field of `Latencies` of an operation that has none of its own name."""


def _rates(value: object) -> object:
    """A bare number is the rate of any operation."""
    return {ANY: value} if isinstance(value, int | float) and not isinstance(value, bool) else value


Probability = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[dict[str, Probability], BeforeValidator(_rates)]
"""Probabilities by operation, "any" for those not named; a bare number is for all of them."""


class FailAfter(_Part):
    """From some moment on every operation fails."""

    operations: int | None = Field(None, ge=0, description="operations that still work")
    seconds: float | None = Field(None, ge=0, description="seconds from opening it")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.operations is None and self.seconds is None:
            raise ValueError("operations or seconds has to be given")
        return self


class Luck(_Part):
    """How often things go wrong by themselves, drawn from the seed."""

    failures: Rates = Field(default_factory=dict, description="fails before it has any effect")
    partial_failures: Rates = Field(default_factory=dict, description="fails after its effect")
    hangs: Rates = Field(default_factory=dict, description="does not answer")
    hang_seconds: float = Field(3600, gt=0, description="how long a hang lasts")
    lost_events: Probability = 0.0
    stale_status: Probability = 0.0
    stale_seconds: float = Field(1.0, gt=0, description="how old a stale answer is")
    crashes: Probability = Field(0.0, description="the hypervisor crashes under an operation")
    back_after: float = Field(30.0, gt=0, description="seconds until a crashed one is back")
    fail_after: FailAfter | None = None

    @field_validator("failures", "partial_failures", "hangs")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name != ANY and name not in OPERATION_NAMES:
                close = get_close_matches(name, [*OPERATION_NAMES, ANY], n=1)
                advice = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"there is no operation {name!r}{advice}")
        return value


class Oversubscription(_Part):
    """How much more is given to machines than the simulated host has."""

    vcpus: float = Field(1.0, ge=1)
    memory: float = Field(1.0, ge=1)
    disk: float = Field(1.0, ge=1)


class SimulationProfile(_Part):
    """Everything about a simulated hypervisor but its seed."""

    name: str = Field("custom", min_length=1)
    summary: str = ""
    latency: Latencies = Field(default_factory=Latencies)
    luck: Luck = Field(default_factory=Luck)
    limits: Limits = Field(
        default_factory=Limits,
        description="of one machine, and of the host: vcpus, memory and disk_space before "
        "over-subscription",
    )
    oversubscription: Oversubscription = Field(default_factory=Oversubscription)
    without: frozenset[Capability] = Field(
        frozenset(), description="capabilities that it does not have"
    )
    architectures: frozenset[Architecture] = Field(frozenset(Architecture), min_length=1)
    faults: FaultSchedule = Field(default_factory=FaultSchedule)

    @property
    def effective_limits(self) -> Limits:
        """The limits that machines meet: the host's, times over-subscription."""
        limits, ratio = self.limits, self.oversubscription
        return limits.model_copy(
            update={
                "vcpus": _times(limits.vcpus, ratio.vcpus),
                "memory": _times(limits.memory, ratio.memory),
                "disk_space": _times(limits.disk_space, ratio.disk),
            }
        )

    @classmethod
    def load(cls, name: str) -> SimulationProfile:
        """The built-in profile of that name, or the one that a TOML file describes.

        Raises:
            InvalidSpec: naming the file, the field, its value and what would be right.
        """
        if name in BUILT_IN:
            return BUILT_IN[name]
        if not name.endswith(".toml") and "/" not in name:
            known = ", ".join(BUILT_IN)
            problem = SpecProblem("profile", name, f"one of {known}, or the path of a TOML file")
            raise InvalidSpec([problem], source="options", hint="check the spelling")
        return _read(cls, Path(name))


def _times(limit: int | None, ratio: float) -> int | None:
    return None if limit is None else int(limit * ratio)


def _read(model: type[SimulationProfile], path: Path) -> SimulationProfile:
    source = str(path)
    hint = f"a profile has the fields {', '.join(['extends', *model.model_fields])}"
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = SpecProblem("profile", source, f"a readable UTF-8 file ({reason})")
        raise InvalidSpec([problem], source=source, hint="check the path") from error
    except tomllib.TOMLDecodeError as error:
        problem = SpecProblem("document", source, f"valid TOML ({error})")
        raise InvalidSpec([problem], source=source, hint="mend the TOML") from error
    extends = data.pop("extends", None)
    if extends is not None:
        if extends not in BUILT_IN:
            problem = SpecProblem("extends", extends, f"one of {', '.join(BUILT_IN)}")
            raise InvalidSpec([problem], source=source, hint=hint)
        below = BUILT_IN[extends].model_dump(
            mode="json", exclude_unset=True, exclude={"name", "summary"}
        )
        data = _merged(below, data)
    data.setdefault("name", path.stem)
    try:
        return build(model, data, source=source)
    except InvalidSpec as error:
        error.hint = hint
        raise


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`, table by table."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            value = _merged(under, value)
        merged[key] = value
    return merged


_MISSING: Final = frozenset(
    {
        Capability.SHARE_9P,
        Capability.SHARE_VIRTIOFS,
        Capability.GPU_PASSTHROUGH,
        Capability.SRIOV_PASSTHROUGH,
    }
)
NEVER: Final[Mapping[Capability, str]] = dict.fromkeys(
    sorted(_MISSING), "the simulated guest has no such device"
)
"""Capabilities that no profile has, with the reason."""

BUILT_IN: Final[Mapping[str, SimulationProfile]] = {
    "standard": SimulationProfile(
        name="standard",
        summary="a host like many: 100 machines, realistic latencies, nothing fails",
        limits=Limits(
            machines=100,
            vcpus_per_machine=16,
            vcpus=128,
            memory_per_machine=32 * GIB,
            memory=256 * GIB,
            disks_per_machine=26,
            disk_size=2 * TIB,
            disk_space=20 * TIB,
            nics_per_machine=8,
            ports=4096,
        ),
        oversubscription=Oversubscription(vcpus=4.0, memory=1.5, disk=2.0),
    ),
    "performance": SimulationProfile(
        name="performance",
        summary="a large and quick host: 1,000 machines",
        latency=Latencies(create=0.05, start=0.5, stop=0.2, snapshot=0.05, restore=0.05),
        limits=Limits(
            machines=1000,
            vcpus_per_machine=64,
            memory_per_machine=128 * GIB,
            disks_per_machine=64,
            disk_size=16 * TIB,
            nics_per_machine=32,
            ports=16384,
        ),
    ),
    "unreliable": SimulationProfile(
        name="unreliable",
        summary="a bad day: operations fail, hang and lie, events get lost",
        latency=Latencies(variability=0.5),
        luck=Luck(
            failures={"create": 0.1, ANY: 0.03},
            partial_failures={ANY: 0.02},
            hangs={ANY: 0.01},
            lost_events=0.02,
            stale_status=0.05,
        ),
        limits=Limits(
            machines=50,
            vcpus_per_machine=8,
            vcpus=64,
            memory_per_machine=16 * GIB,
            memory=64 * GIB,
            disks_per_machine=8,
            disk_size=1 * TIB,
            disk_space=4 * TIB,
            nics_per_machine=4,
            ports=256,
        ),
        oversubscription=Oversubscription(vcpus=4.0, memory=2.0, disk=2.0),
        without=frozenset(
            {
                Capability.SNAPSHOT,
                Capability.MEMORY_SNAPSHOT,
                Capability.RESTORE,
                Capability.COLD_MIGRATION,
                Capability.LIVE_MIGRATION,
            }
        ),
    ),
}
