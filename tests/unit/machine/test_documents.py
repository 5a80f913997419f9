"""Reading documents: files of every kind, and complaints that tell where and what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmlab.machine import documents
from vmlab.machine.documents import build, parse_document, read_document
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.faults import FaultSchedule
from vmlab.machine.spec import MachineSpec


def complaint(text: str | bytes, form: str = "toml") -> SpecProblem:
    with pytest.raises(InvalidSpec) as caught:
        MachineSpec.parse(text, form=form)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", 'name = "x"'), ("a.json", '{"name": "x"}'), ("a", "name = 'x'")]
)
def test_the_form_of_a_file_is_told_by_its_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert MachineSpec.load(tmp_path / name).name == "x"


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfname = 'x'\r\ncpus = 2\r\n")
    assert MachineSpec.load(tmp_path / "a.toml").cpus.count == 2


@pytest.mark.parametrize("what", ["missing", "directory", "nul"])
def test_a_file_that_cannot_be_read_is_invalid(tmp_path: Path, what: str) -> None:
    path = {"missing": tmp_path / "x", "directory": tmp_path, "nul": Path("a\0b")}[what]
    with pytest.raises(InvalidSpec) as caught:
        MachineSpec.load(path)
    (problem,) = caught.value.problems
    assert problem.field == "file"
    assert "a file that can be read (" in problem.expected
    assert caught.value.hint == "check the path"


def test_a_file_without_permission_is_invalid(ordinary_user: Path) -> None:
    (ordinary_user / "a.toml").touch(0o000)
    with pytest.raises(InvalidSpec, match="Permission denied"):
        MachineSpec.load(ordinary_user / "a.toml")


def test_a_file_that_is_too_large_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT", 1 << 20)
    with (tmp_path / "a.toml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidSpec, match="at most 1 MiB"):
        MachineSpec.load(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("text", "form", "field", "value", "expected"),
    [
        ("name = 'a'\n\n cpus == 2\n", "toml", "line 3", "cpus == 2", "(Invalid value at column"),
        ("name = '''", "toml", "line 1", "name = '''", "at the end)"),
        ("name = 'a'\nname = 'b'", "toml", "line 2", "name = 'b'", "Cannot overwrite a value"),
        ("a = " + "[" * 5000, "toml", "document", None, "nested less deeply"),
        ("seed = " + "9" * 5000, "toml", "document", None, "a number has too many digits"),
        ('{"name": "a",\n"cpus" 2}', "json", "line 2", '"cpus" 2}', "delimiter at column 8"),
        ("", "json", "line 1", "", "Expecting value at column 1"),
        ("[" * 100_000, "json", "document", None, "nested less deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "json", "document", None, "too many digits"),
        ('{"seed": NaN}', "json", "document", None, "NaN is not JSON"),
        ('{"a": {"b": 1, "b": 2}}', "json", "document", None, "the name 'b' is used twice"),
        ("null", "json", "document", None, "a table of fields"),
        ("[1]", "json", "document", "[1]", "a table of fields"),
        ("", "toml", "name", None, "this field has to be given"),
        ("# nothing\n", "toml", "name", None, "this field has to be given"),
        (b"name = 'a'\n# \xff\xfe", "toml", "line 2", "b'\\xff\\xfe'", "UTF-8 text ("),
        (b'{"name": "\xe4"}', "json", "line 1", "b'\\xe4\"}'", "UTF-8 text ("),
        ('{"name": "a", "\\ud800": 1}', "json", "document", "\ud800", "valid Unicode text"),
    ],
)
def test_text_that_is_no_document_is_told_with_its_line(
    text: str | bytes, form: str, field: str, value: str | None, expected: str
) -> None:
    problem = complaint(text, form)
    assert problem.field == field
    assert expected in problem.expected
    if value is not None:
        assert problem.value == value


def test_an_unknown_form_is_refused() -> None:
    assert complaint("", "yaml").field == "form"


@settings(max_examples=300)
@given(st.text() | st.binary(), st.sampled_from(["toml", "json"]))
def test_any_text_is_a_document_or_invalid(text: str | bytes, form: str) -> None:
    try:
        parse_document(MachineSpec, text, form=form)
    except InvalidSpec as error:
        str(error).encode("utf-8", "surrogatepass")
        error.to_record()


@settings(max_examples=100)
@given(st.binary(), st.sampled_from([".toml", ".json"]))
def test_any_file_is_a_document_or_invalid(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(data)
    try:
        read_document(FaultSchedule, file)
    except InvalidSpec as error:
        assert error.source == str(file)


@pytest.mark.parametrize("field", ["name", "labels", "cpus", "channels", "nothing"])
def test_data_that_is_nested_deeply_or_in_itself_is_invalid(field: str) -> None:
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(10_000):
        inner["a"] = inner = {}
    loop: dict[str, Any] = {}
    loop["a"] = loop
    for value in (deep, loop):
        with pytest.raises(InvalidSpec) as caught:
            MachineSpec.of(**({"name": "a"} | {field: value}))
        assert len(str(caught.value)) < 1000


# Models of other kinds: the words are the same.


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    depth: int = Field(1, lt=10)
    ratio: float = Field(0.5, gt=0)
    words: list[str] = Field([], max_length=2)
    code: str = Field("a", pattern="^[a-z]$")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inner: Inner = Inner()
    either: int | Inner | list[int] = 1
    pairs: dict[str, Inner] = {}
    blob: bytes = b""


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        ({"inner": {"depth": 10}}, {"inner.depth": "less than 10"}),
        ({"inner": {"ratio": 0}}, {"inner.ratio": "more than 0"}),
        ({"inner": {"words": ["a", "b", "c"]}}, {"inner.words": "at most 2 of them"}),
        ({"inner": {"code": "A"}}, {"inner.code": "text like the pattern ^[a-z]$"}),
        ({"pairs": {"x": {"dept": 1}}}, {"pairs.x.dept": "no such field; did you mean 'depth'?"}),
        ({"blob": 5}, {"blob": "bytes"}),
        ({"innre": 1}, {"innre": "no such field; did you mean 'inner'?"}),
        ({"x": 1}, {"x": "no such field; there are inner, either, pairs, blob"}),
    ],
)
def test_models_of_others_are_complained_about_in_the_same_words(
    table: dict[str, Any], fields: dict[str, str]
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        build(Settings, table)
    assert {p.field: p.expected for p in caught.value.problems} == fields
    assert str(caught.value).startswith("settings has 1 problem:\n")


def test_branches_of_a_union_are_no_part_of_a_field() -> None:
    with pytest.raises(InvalidSpec) as caught:
        build(Settings, {"either": "x"})
    assert {problem.field for problem in caught.value.problems} == {"either"}
    with pytest.raises(InvalidSpec) as caught:
        build(Settings, {"either": {"depth": "x"}})
    assert "either.depth" in {problem.field for problem in caught.value.problems}


def test_what_is_too_deep_for_python_is_invalid() -> None:
    class Bottomless(BaseModel):
        @model_validator(mode="before")
        @classmethod
        def _descend(cls, value: object) -> object:
            return cls._descend(value)

    with pytest.raises(InvalidSpec, match="nested less deeply"):
        build(Bottomless, {"a": 1})


def test_what_cannot_be_written_is_named_by_its_type() -> None:
    class Unwritable(Mapping[str, int]):
        def __getitem__(self, key: str) -> int:
            raise KeyError(key)

        def __iter__(self) -> Iterator[str]:
            return iter(())

        def __len__(self) -> int:
            return 0

        def __repr__(self) -> str:
            raise RecursionError

    with pytest.raises(InvalidSpec, match=r"labels\.x = .*Unwritable"):
        MachineSpec.of(name="a", labels={"x": Unwritable()})


def test_tables_in_a_list_are_told_by_their_number() -> None:
    class Many(BaseModel):
        all: dict[str, list[Inner]]

    with pytest.raises(InvalidSpec) as caught:
        build(Many, {"all": {"x": [{}, {"depth": "?"}]}})
    assert [problem.field for problem in caught.value.problems] == ["all.x.1.depth"]


def test_relative_paths_are_seen_from_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "a.toml").write_text(
        'name = "a"\n[boot]\nkernel = "../Image"\n[[disks]]\nname = "d"\nsource = "/d.raw"\n'
    )
    monkeypatch.chdir(tmp_path)
    spec = MachineSpec.load(Path("lab/a.toml"))
    assert spec.boot.kernel == tmp_path / "lab" / ".." / "Image"
    assert spec.disks[0].source == Path("/d.raw")
    assert MachineSpec.parse('name = "a"\n[boot]\nkernel = "Image"\n').boot.kernel == Path("Image")
