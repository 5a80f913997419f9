"""The matrix of a plan: every combination of hypervisors, images and architectures that is meant.

A cell is one of them, and is one test. What the lab chooses by itself is None in a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Final, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from vmlab.machine.architecture import SPELLINGS, Architecture, parse_architecture
from vmlab.machine.fields import Name, Text, Wrong, choice

MOST_CELLS: Final = 1000
"""Cells of one plan; more is a mistake, and would take a day or more."""

ImageName = Annotated[str, Text(r"^[^\0\n]{1,4096}$", "the name of an image, in one line")]
"""An image of the store or the path of a recipe, as `vmlab run --image` takes them."""


def _architecture(value: object) -> object:
    return value if isinstance(value, Architecture) else parse_architecture(value)


ArchitectureField = Annotated[
    Architecture,
    BeforeValidator(_architecture),
    WithJsonSchema({"type": "string", "enum": list(SPELLINGS)}),
]
"""A guest's architecture in any of its usual spellings."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination; None is whatever the lab takes where nothing is said."""

    hypervisor: str | None = None
    image: str | None = None
    architecture: Architecture | None = None

    @property
    def id(self) -> str:
        """What tells it from the plan's other cells, as "qemu-debian-12-amd64-tiny"."""
        parts = (self.hypervisor, self.image, self.architecture and self.architecture.value)
        return "-".join(part for part in parts if part)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exclusion(_Table):
    """Cells that are left out: those that have all of the values named here."""

    hypervisor: Name | None = Field(None, description="a hypervisor of the matrix")
    image: ImageName | None = Field(None, description="an image of the matrix")
    architecture: ArchitectureField | None = Field(
        None, description="an architecture of the matrix"
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.hypervisor is self.image is self.architecture is None:
            raise Wrong("hypervisor", None, "hypervisor, image or architecture has to be given")
        return self

    def covers(self, cell: Cell) -> bool:
        """Whether `cell` is left out by it."""
        return (
            self.hypervisor in {None, cell.hypervisor}
            and self.image in {None, cell.image}
            and self.architecture in {None, cell.architecture}
        )


class Matrix(_Table):
    """What a plan is run on: each hypervisor with each image with each architecture."""

    hypervisors: tuple[Name, ...] = Field(
        (), description="hypervisors; the lab's choice if left out"
    )
    images: tuple[ImageName, ...] = Field((), description="images; `machine.image` if left out")
    architectures: tuple[ArchitectureField, ...] = Field(
        (),
        description="architectures: without an image each has its tiny Debian, and an image of "
        "another architecture makes no cell",
    )
    exclude: tuple[Exclusion, ...] = Field((), description="combinations that are left out")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        axes: dict[str, tuple[str, Sequence[str]]] = {
            "hypervisor": ("hypervisors", self.hypervisors),
            "image": ("images", self.images),
            "architecture": ("architectures", self.architectures),
        }
        for field, values in axes.values():
            for position, value in enumerate(values):
                if value in values[:position]:
                    raise Wrong(f"{field}.{position}", value, "a value that is not there already")
        for position, exclusion in enumerate(self.exclude):
            for key, (field, values) in axes.items():
                value = getattr(exclusion, key)
                if value is not None and value not in values:
                    known = choice(value, values) if values else f"nothing: there are no {field}"
                    raise Wrong(f"exclude.{position}.{key}", str(value), known)
        size = max(1, len(self.hypervisors)) * max(1, len(self.images))
        size *= max(1, len(self.architectures))
        if size > MOST_CELLS:
            raise Wrong("hypervisors", size, f"at most {MOST_CELLS} combinations in all")
        if not any(True for _ in self.cells()):
            raise Wrong("exclude", len(self.exclude), "exclusions that leave at least one cell")
        return self

    def cells(self) -> Iterator[Cell]:
        """The cells that are not left out, the last axis changing first."""
        axes = (self.hypervisors or (None,), self.images or (None,), self.architectures or (None,))
        for hypervisor, image, architecture in product(*axes):
            cell = Cell(hypervisor, image, architecture)
            if not any(exclusion.covers(cell) for exclusion in self.exclude):
                yield cell
