"""The options of the simulated hypervisor, as text, and what they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmlab.machine.documents import build
from vmlab.machine.errors import InvalidSpec


class Options(BaseModel):
    """What a simulated hypervisor is opened with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field(
        "standard", min_length=1, description="standard, performance, unreliable, or a TOML file"
    )
    seed: int | None = Field(
        None, ge=0, lt=1 << 64, description="of all randomness; drawn and reported if left out"
    )
    clock: Literal["virtual", "wall"] = "virtual"
    socket: Path | None = Field(None, description="of a `vmlab simulate` to use instead")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.model_fields_set & {"profile", "clock"}
        if self.socket is not None and given:
            names = " and ".join(sorted(given))
            raise ValueError(f"socket: the process that serves it chooses {names}")
        return self


def read_options(options: Mapping[str, str]) -> Options:
    """The options that were given as text.

    Raises:
        InvalidSpec: naming the option, its value and what would be right.
    """
    try:
        return build(Options, dict(options), source="options of the simulated hypervisor")
    except InvalidSpec as error:
        error.hint = "options are " + ", ".join(Options.model_fields)
        raise
