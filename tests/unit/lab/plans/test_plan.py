"""Plan files: what they may say, what is said of one that is wrong, and any other text."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.machine.strategies import disks, inline, json_values, names, nics, toml

from vmlab.cli.schema import Document, schema_of
from vmlab.lab.plans import Cell, Plan
from vmlab.lab.plans.phases import LONGEST_SCRIPT
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.faults import FaultKind
from vmlab.machine.sizes import GIB, MIB
from vmlab.report import Direction

WHOLE = """
name = "hello module"
description = "builds a module and loads it"
seed = 7
shares = [{ source = ".", target = "/src", readonly = false }, { source = "x", target = "/x" }]

[machine]
image = "debian-12-amd64-dev"
memory = "1G"
cpus = 2
disks = [{ name = "data", size = "64M" }]
nics = [{ name = "net0" }]
timeout = 120

[environment]
LANG = "C"

[matrix]
hypervisors = ["qemu", "embedded"]
architectures = ["amd64", "riscv64"]
exclude = [{ hypervisor = "embedded", architecture = "x86_64" }]

[faults]
faults = [{ kind = "disk-slow", disk = "data", delay = 0.5 }]

[[phases]]
name = "build"
run = "make -C /src"
timeout = 300
artifacts = ["/src/*.ko"]

[[phases]]
name = "load"
run = '''
insmod /src/hello.ko
rmmod hello'''
environment = { WORDS = "a b" }
directory = "/src"
results = ["/tmp/*.xml"]

[[phases]]
name = "measure"
needs = ["build"]
continue-on-error = true
run = "fio job"
metrics = [{ pattern = 'bw=(?P<bw>\\d+)', unit = "MiB/s", direction = "higher" }]
"""

ONE = '[[phases]]\nname = "a"\nrun = "true"\n'


@cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema_of(Document.PLAN))


def complaint(text: str, source: str | None = None) -> SpecProblem:
    with pytest.raises(InvalidSpec) as caught:
        Plan.parse(text, source=source)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def phases(*tables: dict[str, Any]) -> str:
    return "phases = " + inline([{"run": "true", **table} for table in tables])


def test_a_plan_says_machine_shares_phases_matrix_faults_and_seed() -> None:
    plan = Plan.parse(WHOLE)
    assert plan.name == "hello module"
    machine = plan.machine
    assert (machine.image, machine.memory, machine.cpus) == (
        "debian-12-amd64-dev", GIB, 2,
    )  # fmt: skip
    assert machine.disks[0].size == 64 * MIB
    assert [(share.tag, share.target, share.readonly) for share in plan.shares] == [
        ("share0", "/src", False),
        ("share1", "/x", True),
    ]
    build, load, measure = plan.ordered
    assert (build.timeout, build.artifacts) == (300, ("/src/*.ko",))
    assert load.run == "insmod /src/hello.ko\nrmmod hello"
    assert (load.directory, load.results, load.environment) == (
        "/src", ("/tmp/*.xml",), {"WORDS": "a b"},
    )  # fmt: skip
    assert measure.continue_on_error
    assert not load.continue_on_error
    (metric,) = measure.metrics
    assert (metric.names, metric.unit, metric.direction) == (("bw",), "MiB/s", Direction.HIGHER)
    schedule = plan.schedule(99)
    assert schedule is not None
    assert schedule.seed == 7
    assert schedule.faults[0].kind is FaultKind.DISK_SLOW


def test_the_schema_accepts_it_and_refuses_unknown_fields() -> None:
    import tomllib

    validator().validate(tomllib.loads(WHOLE))
    assert not validator().is_valid(tomllib.loads(WHOLE + "continue_on_error = true\n"))
    assert not validator().is_valid({"phases": []})
    assert not validator().is_valid({"name": "x"})


def test_a_phase_needs_the_one_before_it_unless_it_says_what_it_needs() -> None:
    plan = Plan.parse(
        phases(
            {"name": "a"},
            {"name": "b"},
            {"name": "c", "needs": []},
            {"name": "d", "needs": ["a", "a"]},
        )
    )
    assert plan.needs == {"a": (), "b": ("a",), "c": (), "d": ("a",)}


def test_phases_run_after_those_that_they_need_else_in_the_order_of_the_file() -> None:
    plan = Plan.parse(
        phases(
            {"name": "last", "needs": ["c", "b"]},
            {"name": "c", "needs": []},
            {"name": "b", "needs": ["a"]},
            {"name": "a", "needs": []},
            {"name": "e"},
        )
    )
    assert [phase.name for phase in plan.ordered] == ["c", "a", "b", "last", "e"]


@pytest.mark.parametrize(
    ("tables", "field", "expected"),
    [
        ([{"name": "a"}, {"name": "a"}], "phases.1.name", "a name that phases.0 has not"),
        ([{"name": "a", "needs": ["a"]}], "phases.0.needs.0", "another phase; it cannot need"),
        ([{"name": "a", "needs": ["b"]}], "phases.0.needs.0", "no other phase"),
        (
            [{"name": "build"}, {"name": "b", "needs": ["biuld"]}],
            "phases.1.needs.0",
            "one of 'build'; did you mean 'build'?",
        ),
        (
            [{"name": "x"}, {"name": "a", "needs": ["b"]}, {"name": "b", "needs": ["a"]}],
            "phases.1.needs",
            "no circle: a needs b needs a",
        ),
        (
            # The one before it is needed too where nothing is said.
            [{"name": "a", "needs": ["c"]}, {"name": "b"}, {"name": "c"}],
            "phases.0.needs",
            "no circle: a needs c needs b needs a",
        ),
    ],
)
def test_needs_that_cannot_be_met_are_told(
    tables: list[dict[str, Any]], field: str, expected: str
) -> None:
    problem = complaint(phases(*tables))
    assert problem.field == field
    assert expected in problem.expected


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("", "phases", "this field has to be given"),
        ("phases = []", "phases", "at least one phase, and at most 500"),
        (ONE + "continue_on_error = true", "phases.0.continue_on_error", "n 'continue-on-error'"),
        (ONE + "timout = 3", "phases.0.timout", "did you mean 'timeout'?"),
        (ONE + "timeout = 0", "phases.0.timeout", "more than 0"),
        (ONE + "timeout = inf", "phases.0.timeout", "a finite number"),
        (ONE + 'continue-on-error = "yes"', "phases.0.continue-on-error", "true or false"),
        ('[[phases]]\nname = "a"\nrun = " \\n"', "phases.0.run", "a command, or several lines"),
        ('[[phases]]\nname = "a b"\nrun = "x"', "phases.0.name", "1 to 63 letters"),
        (ONE + "artifacts = ['out/*']", "phases.0.artifacts.0", "an absolute path in the guest"),
        (ONE + "environment = {'A B' = 'c'}", "phases.0.environment.'A B'", "no digit first"),
        (ONE + "[machine]\nmemmory = '1G'", "machine.memmory", "did you mean 'memory'?"),
        (ONE + "[machine]\nmemory = '1Q'", "machine.memory", "a size is a number with K"),
        (ONE + "[machine]\ndisks = [{name = 'a'}]", "machine.disks.0.size", "size or source"),
        (ONE + "[matrx]\n", "matrx", "did you mean 'matrix'?"),
        (ONE + "[[shares]]\nsource = '.'", "shares.0.target", "has to be given"),
        (ONE + "[faults]\nfaults = [{kind = 'x'}]", "faults.faults.0.kind", "one of 'disk-error'"),
        (ONE + "[faults]\nfaults = [{kind='kill', id='a'},{kind='kill', id='a'}]",
         "faults.faults.1.id", "an id that no other fault has"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named_with_what_would_be_right(
    text: str, field: str, expected: str
) -> None:
    problem = complaint(text)
    assert problem.field == field
    assert expected in problem.expected


def test_two_shares_of_one_tag_are_told() -> None:
    table = {"source": ".", "target": "/a"}
    shares = inline([{**table, "tag": "share1"}, table])
    problem = complaint(f"shares = {shares}\n{ONE}")
    assert problem.field == "shares.1.tag"
    assert problem.value == "share1"


def test_a_script_that_no_shell_could_be_given_is_told() -> None:
    problem = complaint(phases({"name": "a", "run": "x" * (LONGEST_SCRIPT + 1)}))
    assert problem.field == "phases.0.run"
    assert "script of a share" in problem.expected
    Plan.parse(phases({"name": "a", "run": "x" * LONGEST_SCRIPT}))
    much = {f"V{number}": "x" * 4000 for number in range(9)}
    problem = complaint(phases({"name": "a", "environment": much}))
    assert problem.field == "phases.0.environment"


@pytest.mark.parametrize(
    ("metric", "names"),
    [
        ({"name": "speed", "pattern": r"(\d+) MB/s"}, ("speed",)),
        ({"name": "speed", "pattern": r"(?P<x>\d+) MB/s"}, ("speed",)),
        ({"pattern": r"r=(?P<read>\d+) w=(?P<write>\d+)"}, ("read", "write")),
        ({"pattern": r"\d+"}, None),
        ({"pattern": r"(\d+)"}, None),
        ({"pattern": r"(?P<a>\d+) (\d+)"}, None),
        ({"name": "speed", "pattern": r"\d+"}, None),
        ({"name": "speed", "pattern": r"(\d+) (\d+)"}, None),
        ({"name": "speed", "pattern": r"(\d+"}, None),
    ],
)
def test_a_metric_has_one_group_or_groups_with_names(
    metric: dict[str, str], names: tuple[str, ...] | None
) -> None:
    text = phases({"name": "a", "metrics": [metric]})
    if names is None:
        assert complaint(text).field == "phases.0.metrics.0.pattern"
    else:
        assert Plan.parse(text).phases[0].metrics[0].names == names


def matrix(**axes: Any) -> str:
    return f"{ONE}[matrix]\n" + "".join(f"{key} = {inline(value)}\n" for key, value in axes.items())


def test_a_plan_without_a_matrix_is_one_cell_of_the_machine_s_own() -> None:
    assert list(Plan.parse(ONE).cells()) == [Cell()]
    assert Cell().id == ""
    (cell,) = Plan.parse(ONE + "[machine]\nhypervisor = 'qemu'\nimage = 'tiny'").cells()
    assert cell == Cell("qemu", "tiny")
    assert cell.id == "qemu-tiny"


def test_a_matrix_has_each_with_each_but_for_what_is_excluded() -> None:
    text = matrix(
        hypervisors=["qemu", "embedded"],
        images=["a", "b"],
        architectures=["amd64", "riscv64"],
        exclude=[{"hypervisor": "embedded", "architecture": "x86_64"}, {"image": "b"}],
    )
    assert [cell.id for cell in Plan.parse(text).cells()] == [
        "qemu-a-x86_64",
        "qemu-a-riscv64",
        "embedded-a-riscv64",
    ]
    assert next(Plan.parse(text).cells()).architecture is Architecture.X86_64


@pytest.mark.parametrize(
    ("axes", "field", "expected"),
    [
        ({"images": ["a", "b", "a"]}, "matrix.images.2", "a value that is not there already"),
        ({"architectures": ["amd64", "x86_64"]}, "matrix.architectures.1", "not there already"),
        ({"architectures": ["z80"]}, "matrix.architectures.0", "one of 'riscv64'"),
        (
            {"hypervisors": ["qemu"], "exclude": [{"hypervisor": "quemu"}]},
            "matrix.exclude.0.hypervisor",
            "did you mean 'qemu'?",
        ),
        (
            {"images": ["a"], "exclude": [{"hypervisor": "qemu"}]},
            "matrix.exclude.0.hypervisor",
            "nothing: there are no hypervisors",
        ),
        ({"images": ["a"], "exclude": [{}]}, "matrix.exclude.0.hypervisor", "has to be given"),
        ({"images": ["a"], "exclude": [{"image": "a"}]}, "matrix.exclude", "at least one cell"),
        ({"images": [str(n) for n in range(1001)]}, "matrix.hypervisors", "at most 1000"),
    ],
)
def test_a_matrix_that_cannot_be_meant_is_told(
    axes: dict[str, Any], field: str, expected: str
) -> None:
    problem = complaint(matrix(**axes))
    assert problem.field == field
    assert expected in problem.expected


@pytest.mark.parametrize(("axis", "field"), [("hypervisors", "hypervisor"), ("images", "image")])
def test_what_the_matrix_names_the_machine_does_not(axis: str, field: str) -> None:
    problem = complaint(matrix(**{axis: ["qemu"]}) + f"[machine]\n{field} = 'x'\n")
    assert problem.field == f"machine.{field}"
    assert problem.expected == f"nothing beside matrix.{axis}"


def test_a_file_gives_its_plan_a_name_and_paths_a_place(tmp_path: Path) -> None:
    file = tmp_path / "soak-1.vmlab.toml"
    file.write_text("shares = [{source = 'src', target = '/src'}]\n" + ONE)
    plan = Plan.load(file)
    assert plan.name == "soak-1"
    assert plan.shares[0].source == tmp_path / "src"
    file.write_text('name = "other"\n' + ONE)
    assert Plan.load(file).name == "other"


def test_faults_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text("seed = 5\nfaults = [{kind = 'kill'}]\n")
    file = tmp_path / "a.vmlab.toml"
    file.write_text("faults = 'faults.toml'\nseed = 9\n" + ONE)
    schedule = Plan.load(file).schedule(1)
    assert schedule is not None
    # A seed of its own comes before the plan's, and that before the run's.
    assert schedule.seed == 5
    assert schedule.faults[0].id == "kill-1"
    (tmp_path / "faults.toml").write_text("faults = [{kind = 'kil'}]\n")
    with pytest.raises(InvalidSpec, match=r"faults\.toml has 1 problem") as caught:
        Plan.load(file)
    assert caught.value.problems[0].field == "faults.0.kind"
    file.write_text("faults = 'no.toml'\n" + ONE)
    with pytest.raises(InvalidSpec, match=r"no\.toml"):
        Plan.load(file)


def test_faults_without_a_seed_have_the_plan_s_or_the_run_s() -> None:
    faults = "[faults]\nfaults = [{kind = 'kill'}]\n"
    own = Plan.parse("seed = 9\n" + ONE + faults).schedule(1)
    of_the_run = Plan.parse(ONE + faults).schedule(1)
    assert own is not None
    assert of_the_run is not None
    assert (own.seed, of_the_run.seed) == (9, 1)
    assert Plan.parse(ONE).schedule(1) is None


def test_the_file_is_named_in_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "a.vmlab.toml"
    file.write_text("[[phases]]\nname = 'a'\n")
    with pytest.raises(InvalidSpec, match=r"a\.vmlab\.toml has 1 problem:\n  phases\.0\.run"):
        Plan.load(file)


_guest_paths = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), max_size=20).map(
    lambda text: "/" + text
)
_variables = st.dictionaries(
    st.text("ABC_xyz", min_size=1, max_size=8),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10),
    max_size=3,
)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Valid plans, as plain data."""
    called = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    tables = []
    for number, name in enumerate(called):
        table = draw(
            st.fixed_dictionaries(
                {"run": st.text("abc; \n", max_size=30).map(lambda text: text + "x")},
                optional={
                    "timeout": st.floats(0.001, 1e6),
                    "continue-on-error": st.booleans(),
                    "environment": _variables,
                    "directory": _guest_paths,
                    "artifacts": st.lists(_guest_paths, max_size=3),
                    "results": st.lists(_guest_paths, max_size=3),
                    "needs": st.lists(st.sampled_from(called[:number]), max_size=3)
                    if number
                    else st.just([]),
                },
            )
        )
        tables.append({"name": name, **table})
    rest = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "name": st.text(
                    st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1, max_size=20
                ),
                "environment": _variables,
                "seed": st.integers(0, (1 << 63) - 1),
                "machine": st.fixed_dictionaries(
                    {},
                    optional={
                        "memory": st.integers(1, 4096).map(lambda mib: f"{mib}M"),
                        "cpus": st.integers(1, 64),
                        "disks": st.lists(disks, max_size=2),
                        "nics": st.lists(nics, max_size=2),
                    },
                ),
                "matrix": st.fixed_dictionaries(
                    {}, optional={"hypervisors": st.lists(names, max_size=3, unique=True)}
                ),
            },
        )
    )
    return {**rest, "phases": tables}


@settings(max_examples=100)
@given(plans())
def test_every_valid_plan_is_read_and_runs_its_phases_after_what_they_need(
    table: dict[str, Any],
) -> None:
    plan = Plan.parse(toml(table))
    validator().validate(json.loads(json.dumps(table)))
    done: list[str] = []
    for phase in plan.ordered:
        assert set(plan.needs[phase.name]) <= set(done)
        done.append(phase.name)
    assert sorted(done) == sorted(one["name"] for one in table["phases"])
    assert list(plan.cells())


@settings(max_examples=100)
@given(plans(), st.data())
def test_a_plan_with_anything_anywhere_is_read_or_told(
    table: dict[str, Any], data: st.DataObject
) -> None:
    place: Any = table
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from([*keys, "unheard-of"] if isinstance(place, dict) else keys))
        inner = place.get(key) if isinstance(place, dict) else place[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            place = inner
            continue
        place[key] = data.draw(json_values.filter(lambda value: value is not None))
        break
    try:
        text = toml(table)
        Plan.parse(text)
    except InvalidSpec as error:
        assert error.problems
        str(error).encode("utf-8", "surrogatepass")


@settings(max_examples=100)
@given(st.integers(2, 12), st.randoms(use_true_random=False))
def test_needs_in_any_direction_are_in_order_or_a_circle_that_is_one(
    count: int, random: Any
) -> None:
    called = [f"p{number}" for number in range(count)]
    tables = [
        {
            "name": name,
            "needs": random.sample(
                [one for one in called if one != name], random.randint(0, 2 if count > 2 else 1)
            ),
        }
        for name in called
    ]
    try:
        plan = Plan.parse(phases(*tables))
    except InvalidSpec as error:
        circle = str(error).partition("no circle: ")[2].split("\n")[0].split(" needs ")
        needs = {table["name"]: table["needs"] for table in tables}
        assert len(circle) > 2
        assert circle[0] == circle[-1]
        assert all(two in needs[one] for one, two in pairwise(circle))
    else:
        position = {phase.name: number for number, phase in enumerate(plan.ordered)}
        for table in tables:
            assert all(position[one] < position[table["name"]] for one in table["needs"])
