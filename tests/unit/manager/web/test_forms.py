"""Forms: what a person filled in, as a request, or what is wrong with it by field."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request as HttpRequest

from vmlab.machine.errors import InvalidSpec
from vmlab.manager import requests
from vmlab.manager.api.problems import BadRequest, TooLarge
from vmlab.manager.web.forms import Form, by_field, made, names_itself, read_form

FORM = "application/x-www-form-urlencoded"


def request(*chunks: bytes, kind: str = FORM) -> HttpRequest:
    """A request with that body."""
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": n < len(chunks)}
        for n, chunk in enumerate(chunks, 1)
    ]

    async def receive() -> dict[str, object]:
        return waiting.pop(0)

    headers = [(b"content-type", kind.encode())]
    return HttpRequest({"type": "http", "method": "POST", "headers": headers}, receive)


def read(*chunks: bytes, kind: str = FORM) -> Form:
    return asyncio.run(read_form(request(*chunks, kind=kind)))


def test_fields_are_read_as_they_were_sent() -> None:
    form = read(b"name=+web+1+&memory=&start=yes&disks=a&dis", b"ks=b&disks=&text=a%0D%0Ab%0D%0A")
    assert form.raw("name") == " web 1 "
    assert form.text("name") == "web 1"
    assert form.text("memory") is None
    assert form.text("nothing") is None
    assert form.flag("start")
    assert not form.flag("stop")
    assert form.all("disks") == ("a", "b")
    assert form.lines("text") == ("a", "b")
    assert read(b"a=1", kind=f"{FORM}; charset=utf-8").raw("a") == "1"


@pytest.mark.parametrize("text, value", [("2", 2), ("", None), ("two", "two"), ("²", "²")])
def test_a_whole_number_is_one_or_is_left_to_be_refused(text: str, value: object) -> None:
    assert Form({"n": [text]}).whole("n") == value


@pytest.mark.parametrize(
    "body, kind",
    [(b"{}", "application/json"), (b"", ""), (b"a=\xff", FORM), (b"a=1&" * 2000, FORM)],
)
def test_what_is_no_form_is_refused(body: bytes, kind: str) -> None:
    with pytest.raises(BadRequest, match="form"):
        read(body, kind=kind)


def test_a_form_that_is_too_large_is_not_read_to_its_end() -> None:
    with pytest.raises(TooLarge, match="1048576 bytes"):
        read(b"a=", b"b" * (1 << 20), b"never asked for")


def test_labels_are_pairs() -> None:
    form = Form({"labels": ["a=1 b=2=3\nc="]})
    assert form.pairs("labels") == {"a": "1", "b": "2=3", "c": ""}
    assert Form().pairs("labels") == {}
    for wrong in ("alone", "=value"):
        with pytest.raises(InvalidSpec, match="key=value"):
            Form({"labels": [wrong]}).pairs("labels")


def test_a_specification_is_json() -> None:
    assert Form({"spec": [' {"a": 1} ']}).json("spec") == {"a": 1}
    assert Form().json("spec") is None
    for wrong in ("{", "[" * 100_000):
        with pytest.raises(InvalidSpec, match="JSON"):
            Form({"spec": [wrong]}).json("spec")


def test_what_is_wrong_is_told_by_field() -> None:
    with pytest.raises(InvalidSpec) as refused:
        made(requests.CreateMachine, name="-", vcpus="two", memory=None, nics=[{"mac": 1}])
    told = by_field(refused.value.problems)
    assert {"name", "vcpus", "nics-0-mac"} == set(told)
    assert "letters" in told["name"]
    assert made(requests.CreateMachine, name=None, vcpus=2).vcpus == 2


def test_problems_of_one_field_are_told_together() -> None:
    problems = [*_problems("size", "a"), *_problems("size", "b"), *_problems("name", "c")]
    assert by_field(problems) == {"size": "a; b", "name": "c"}


def _problems(field: str, expected: str) -> list[object]:
    from vmlab.machine.errors import SpecProblem

    return [SpecProblem(field, None, expected)]


@given(st.text(), st.text())
def test_only_the_name_itself_names_what_is_to_go(name: str, typed: str) -> None:
    form = Form({"confirm": [typed]})
    if typed.strip() == name:
        names_itself(form, name, "disk")
    else:
        with pytest.raises(InvalidSpec, match="the name of the disk"):
            names_itself(form, name, "disk")
