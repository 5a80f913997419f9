"""What a person filled in, as one of the manager's requests, or what is wrong with it by field.

Forms are `application/x-www-form-urlencoded` (WHATWG URL, 5). An empty field is one that was left
out: forms cannot leave out a field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from vmlab.machine.documents import build
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.manager.api.problems import BadRequest, TooLarge

__all__ = ["Form", "by_field", "made", "names_itself", "read_form"]

_LARGEST: Final = 1 << 20
_MOST_FIELDS: Final = 1000
R = TypeVar("R", bound=BaseModel)


@dataclass
class Form:
    """The fields of a form, as they were sent."""

    fields: dict[str, list[str]] = field(default_factory=dict)

    def raw(self, name: str) -> str:
        """The field as it was filled in; empty where it was not."""
        return self.fields.get(name, [""])[-1]

    def text(self, name: str) -> str | None:
        """The field without the spaces around it; None where nothing is left."""
        return self.raw(name).strip() or None

    def all(self, name: str) -> tuple[str, ...]:
        """Every value of a field that may be chosen more than once."""
        return tuple(value.strip() for value in self.fields.get(name, ()) if value.strip())

    def whole(self, name: str) -> int | str | None:
        """A whole number, or what stands there instead of one, which the model then refuses."""
        text = self.text(name)
        return int(text) if text is not None and text.isdecimal() and text.isascii() else text

    def flag(self, name: str) -> bool:
        """Whether a box is ticked."""
        return name in self.fields

    def lines(self, name: str) -> tuple[str, ...]:
        """The lines of a field that are not empty."""
        return tuple(line.strip() for line in self.raw(name).splitlines() if line.strip())

    def json(self, name: str) -> object:
        """The JSON of a field; None where it is empty.

        Raises:
            InvalidSpec: It is none.
        """
        text = self.text(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = SpecProblem(name, text, f"JSON ({error})")
            raise InvalidSpec([problem], what="the form") from None

    def pairs(self, name: str) -> dict[str, str]:
        """Lines of "key=value", or words of it.

        Raises:
            InvalidSpec: One of them has no "=" or no key.
        """
        found = {}
        for word in (word for line in self.lines(name) for word in line.split()):
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise InvalidSpec(
                    [SpecProblem(name, word, "words of the form key=value")], what="the form"
                )
            found[key] = value
        return found


async def read_form(request: HttpRequest) -> Form:
    """The form that a request brings.

    Raises:
        BadRequest: It brings something else.
        TooLarge: It is larger than any form of the page.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise BadRequest(f"a form was expected, not {kind or 'nothing'}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST:
            raise TooLarge(f"a form has at most {_LARGEST} bytes")
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS
        )
    except ValueError:
        raise BadRequest("the form cannot be read: it is not UTF-8, or too long") from None
    form = Form()
    for name, value in pairs:
        form.fields.setdefault(name, []).append(value.replace("\r\n", "\n"))
    return form


def made(model: type[R], **values: Any) -> R:
    """A request of `model`; values that are None are left out.

    Raises:
        InvalidSpec: Saying of each field what is wrong with it.
    """
    return build(model, {name: value for name, value in values.items() if value is not None})


def names_itself(form: Form, name: str, what: str) -> None:
    """Go on only where a person typed the name of what is to go.

    Raises:
        InvalidSpec: They typed something else, or nothing.
    """
    typed = form.raw("confirm").strip()
    if typed != name:
        raise InvalidSpec(
            [SpecProblem("confirm", typed, f"{name!r}, the name of the {what}")],
            what="the form",
            hint="type the name of what is to be removed",
        )


def by_field(problems: Iterable[SpecProblem]) -> dict[str, str]:
    """What is wrong, by the name of the form's field."""
    told: dict[str, str] = {}
    for problem in problems:
        name = problem.field.replace(".", "-")
        told[name] = f"{told[name]}; {problem.expected}" if name in told else problem.expected
    return told
