"""The contract as messages: how its methods, arguments, results and errors travel as JSON lines.

What travels is read off the contract itself: each method's arguments are validated by a model made
of its annotations, so that there is no second list of methods and fields to keep in step.

Messages of a client: `{"hello": {...}}` first; `{"id", "call", "of", "arguments"}`, where `of` is a
machine, a stream, or the hypervisor; `{"cancel": id}`. Messages of the server:
`{"welcome": {...}}`; `{"id", "result" | "error" | "cancelled"}`; `{"id", "progress": [sent,
total]}`; `{"machine": {...}}`; `{"stream", "data" | "eof"}` of channels and
`{"stream", "event" | "error" | "end"}` of events.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Final, Literal, cast, get_args, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    create_model,
)

from vmlab.hypervisors import base
from vmlab.hypervisors.base import Channel, Console, Hypervisor, Machine
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec, SpecProblem, VmlabError
from vmlab.machine.problems import invalid
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

VERSION: Final = 1
LIMIT: Final = 1 << 28
"""Bytes of the longest message: a whole machine's contents, when one migrates."""
Message = dict[str, Any]
Kind = Literal["machine", "hypervisor", "simulation"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(_Part):
    """What a client says first: which version it speaks, and for whom."""

    version: int
    kind: Literal["run", "store"]
    owner: str = Field(min_length=1)
    seed: int | None = Field(None, ge=0, description="of a hypervisor that this client begins")


class Welcome(_Part):
    """What the server answers."""

    version: int
    server: str = Field(description="tells this server from others")
    pid: int
    profile: str
    seed: int
    clock: str


class MachineFacts(_Part):
    """What a client knows of a machine without asking."""

    id: str
    name: str
    state: MachineState
    spec: MachineSpec


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the contract: how its arguments are read, and what its result is."""

    name: str
    arguments: type[BaseModel]
    result: TypeAdapter[Any] | None
    returns: Literal["nothing", "value", "machine", "machines", "stream"]


_SCALARS: Final = (int, float, bool, str)


_BYTES: Final[TypeAdapter[bytes]] = TypeAdapter(
    Annotated[bytes, BeforeValidator(base64.b64decode), PlainSerializer(base64.b64encode)]
)


def _field(annotation: Any, default: Any) -> Any:
    """A field of an arguments model; numbers and texts are not made of each other."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    plain = all(part in (*_SCALARS, type(None)) for part in parts)
    default = ... if default is inspect.Parameter.empty else default
    return (annotation, Field(default, strict=True) if plain else default)


def _method(owner: type, name: str, replaced: Mapping[str, Any]) -> Method:
    function = getattr(owner, name)
    hints = get_type_hints(function, vars(base))
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        annotation = replaced.get(parameter.name, hints[parameter.name])
        if annotation is not None:
            fields[parameter.name] = _field(annotation, parameter.default)
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    result = hints["return"]
    if result is type(None):
        return Method(name, arguments, None, "nothing")
    if result is Machine:
        return Method(name, arguments, None, "machine")
    if result == Sequence[Machine]:
        return Method(name, arguments, None, "machines")
    if result is bytes:
        return Method(name, arguments, _BYTES, "value")
    if result in (Channel, Console):
        return Method(name, arguments, None, "stream")
    return Method(name, arguments, TypeAdapter(result), "value")


_NOT_CALLED: Final = frozenset({"close", "subscribe", "loop_factory", "owner"})


def methods_of(owner: type, replaced: Mapping[str, Any] | None = None) -> dict[str, Method]:
    """The coroutine methods of a class, by name.

    Args:
        owner: The class.
        replaced: What stands on the wire for some parameters: a type, or None to leave it out.
    """
    return {
        name: _method(owner, name, replaced or {})
        for name, member in inspect.getmembers(owner, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in _NOT_CALLED
    }


class Target(_Part):
    """Where a machine migrates to: an owner's hypervisor, of this server or of another one."""

    server: str
    socket: str
    kind: Literal["run", "store"]
    owner: str


MACHINE_METHODS: Final = methods_of(Machine, {"target": Target, "progress": None})
HYPERVISOR_METHODS: Final = methods_of(Hypervisor)


def read_arguments(method: Method, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, as the contract has them.

    Raises:
        InvalidSpec: naming the argument, its value and what would be right.
    """
    try:
        model = method.arguments.model_validate(arguments)
    except ValidationError as error:
        found = invalid(error, method.arguments)
        raise InvalidSpec(
            list(found.problems),
            what=method.name,
            operation=method.name,
            hint="see the arguments of this operation in the contract",
        ) from error
    return {name: getattr(model, name) for name in model.model_fields_set}


def plain(value: object) -> Any:
    """An argument as JSON has it; what has no JSON form goes as its text and is refused there."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return repr(value)


def encode(data: bytes) -> str:
    """Bytes of a stream as text."""
    return base64.b64encode(data).decode("ascii")


def decode(text: object) -> bytes:
    """The bytes again.

    Raises:
        HypervisorUnavailable: it is no such text.
    """
    try:
        return base64.b64decode(cast(str, text), validate=True)
    except (ValueError, TypeError) as error:
        raise garbled(f"stream data: {error}") from error


def garbled(what: str) -> HypervisorUnavailable:
    """The other side does not speak this protocol."""
    return HypervisorUnavailable(
        f"the other side of the socket does not speak vmlab's protocol: {what}",
        hint="is it a `vmlab simulate` of the same version?",
        hypervisor="simulated",
    )


def unknown_call(call: object) -> VmlabError:
    """There is no method of that name."""
    return InvalidSpec(
        [SpecProblem("call", call, "a method of the contract")],
        what="call",
        operation="call",
        hint="is the client of the same version?",
    )


class Line:
    """One connection, as messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Message) -> None:
        """Send a message; what cannot be sent any more is dropped: the reader has noticed."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def drained(self) -> None:
        """Wait until the other side has taken most of what was sent."""
        try:
            await self._writer.drain()
        except ConnectionError:
            # `receive` tells of the end.
            return

    async def receive(self) -> Message | None:
        """The next message, or None at the end.

        Raises:
            HypervisorUnavailable: what came is no message.
        """
        try:
            text = await self._reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            # A message that was cut off was never said.
            return None
        except asyncio.LimitOverrunError as error:
            raise garbled("a message is too long") from error
        try:
            message = json.loads(text)
        except ValueError as error:
            raise garbled(f"no JSON ({error})") from error
        if not isinstance(message, dict):
            raise garbled("no JSON object")
        return message

    async def close(self) -> None:
        """End the connection."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            # The other side was quicker.
            return
