"""Plan: the document `*.vmlab.toml`, a test of a machine for people who do not write Python.

A plan says which machine it wants, what is run in it and what is kept. Relative paths in it are
seen from the directory that the file is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from vmlab.lab.plans.matrix import Cell, ImageName, Matrix
from vmlab.lab.plans.phases import (
    LARGEST_ENVIRONMENT,
    MOST_PHASES,
    Environment,
    Phase,
    in_order,
    needs_of,
)
from vmlab.machine.documents import parse_document, read_document
from vmlab.machine.faults import FaultSchedule
from vmlab.machine.fields import DOCUMENT_DIRECTORY, Flag, Name, Number, Text, Whole, Wrong
from vmlab.machine.sizes import LARGEST_SIZE, MIB, Size
from vmlab.machine.spec import MOST_VCPUS, Disk, Nic, Share

__all__ = ["SUFFIX", "Plan", "PlanMachine", "PlanShare"]

SUFFIX: Final = ".vmlab.toml"
"""How the name of a plan's file ends."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanMachine(_Table):
    """The machine that a plan wants; its parts are those of a machine specification."""

    name: Name | None = Field(None, description="name of the machine, for faults; made up if not")
    hypervisor: Name | None = Field(None, description="hypervisor; the lab's choice if left out")
    image: ImageName | None = Field(None, description="image; a tiny Debian if left out")
    memory: Size | None = Field(
        None, ge=MIB, le=LARGEST_SIZE, description="memory; the lab's usual if left out"
    )
    cpus: Whole | None = Field(
        None, ge=1, le=MOST_VCPUS, description="vCPUs; the lab's usual if left out"
    )
    disks: tuple[Disk, ...] = Field((), description="disks beside the image's own")
    nics: tuple[Nic, ...] = Field((), description="network interfaces")
    network: Flag = Field(False, description="a network interface with NAT, set up in the guest")
    timeout: Number | None = Field(
        None, gt=0, description="seconds that it has to boot; the lab's usual if left out"
    )


class PlanShare(Share):
    """A directory of the host's inside the guest."""

    tag: Name = Field("", description="name by which the guest mounts it; made up if left out")


class _InlineOrByPath:
    """In `Annotated[FaultSchedule, ...]`: the path of a file may stand for what it holds."""

    def load(self, value: object, info: ValidationInfo) -> object:
        """The schedule in the file, where `value` is a path.

        Raises:
            InvalidSpec: the file cannot be read, or is none.
        """
        if not isinstance(value, str):
            return value
        if not value or "\0" in value:
            raise ValueError("a table of faults, or the path of a file that has one")
        directory = (info.context or {}).get(DOCUMENT_DIRECTORY, Path())
        return FaultSchedule.load(directory / value)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self.load, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}


class Plan(_Table):
    """What is tested, on which machines, and what is kept of it."""

    model_config = ConfigDict(title="plan")

    name: Annotated[str, Text(r"^[^\0\n]{1,200}$", "a name of at most 200 characters")] = Field(
        "", description="name of the plan; that of its file if left out"
    )
    description: str = Field("", max_length=10_000, description="what it is for")
    machine: PlanMachine = Field(
        default_factory=PlanMachine, description="the machine that it is run in"
    )
    shares: tuple[PlanShare, ...] = Field((), description="directories of the host in the guest")
    environment: Environment = Field(default_factory=dict, description="variables of all phases")
    phases: tuple[Phase, ...] = Field(
        description="what is run in the guest",
        json_schema_extra={"minItems": 1, "maxItems": MOST_PHASES},
    )
    matrix: Matrix = Field(default_factory=Matrix, description="what it is run on")
    faults: Annotated[FaultSchedule, _InlineOrByPath()] | None = Field(
        None, description="what is broken meanwhile, or the path of a file that says so"
    )
    seed: Whole | None = Field(
        None, ge=0, lt=1 << 63, description="source of its chances; the run's if left out"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not 1 <= len(self.phases) <= MOST_PHASES:
            raise Wrong(
                "phases", len(self.phases), f"at least one phase, and at most {MOST_PHASES}"
            )
        needs_of(self.phases)
        for axis, field in (("hypervisors", "hypervisor"), ("images", "image")):
            value = getattr(self.machine, field)
            if value is not None and getattr(self.matrix, axis):
                raise Wrong(f"machine.{field}", value, f"nothing beside matrix.{axis}")
        for position, phase in enumerate(self.phases):
            together = {**self.environment, **phase.environment}
            size = sum(len(f"{name}={value}".encode()) for name, value in together.items())
            if size > LARGEST_ENVIRONMENT:
                right = f"at most {LARGEST_ENVIRONMENT} bytes with those of the plan"
                raise Wrong(f"phases.{position}.environment", f"{size} bytes", right)
        self._tag_shares()
        return self

    def _tag_shares(self) -> None:
        """Give shares without a tag one, and refuse two that have the same."""
        seen: dict[str, int] = {}
        tagged: list[PlanShare] = []
        for position, share in enumerate(self.shares):
            tag = share.tag or f"share{position}"
            if tag in seen:
                raise Wrong(f"shares.{position}.tag", tag, f"a tag that shares.{seen[tag]} has not")
            seen[tag] = position
            tagged.append(share.model_copy(update={"tag": tag}))
        object.__setattr__(self, "shares", tuple(tagged))

    @classmethod
    def load(cls, source: Path) -> Plan:
        """Read a plan from a TOML file; one without a name has that of its file.

        Raises:
            InvalidSpec: naming file, field, value and what would be right.
        """
        plan = read_document(cls, source)
        return plan if plan.name else plan.model_copy(update={"name": named_after(source)})

    @classmethod
    def parse(cls, text: str | bytes, *, source: str | None = None) -> Plan:
        """Read a plan from text in TOML.

        Raises:
            InvalidSpec: naming field, value and what would be right.
        """
        return parse_document(cls, text, source=source)

    @property
    def ordered(self) -> tuple[Phase, ...]:
        """The phases, each after those that it needs, else as they stand in the file."""
        return in_order(self.phases)

    @property
    def needs(self) -> Mapping[str, tuple[str, ...]]:
        """What each phase needs, by names."""
        return needs_of(self.phases)

    def cells(self) -> Iterator[Cell]:
        """What it is run on; the machine's hypervisor and image where the matrix names none."""
        for cell in self.matrix.cells():
            yield Cell(
                cell.hypervisor or self.machine.hypervisor,
                cell.image or self.machine.image,
                cell.architecture,
            )

    def schedule(self, seed: int) -> FaultSchedule | None:
        """The faults, with the plan's seed or that of the run where they have none of their own."""
        if self.faults is None or "seed" in self.faults.model_fields_set:
            return self.faults
        return self.faults.model_copy(update={"seed": self.seed if self.seed is not None else seed})


def named_after(source: Path) -> str:
    """The name of a plan that has none: that of its file without the suffix."""
    return source.name.removesuffix(SUFFIX) or source.name
