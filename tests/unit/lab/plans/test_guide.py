"""The guide to plans says what the model has: its plans are plans, its fields are the fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from vmlab.lab.plans import Plan
from vmlab.lab.plans.matrix import Exclusion, Matrix
from vmlab.lab.plans.phases import DEFAULT_TIMEOUT, MetricPattern, Phase
from vmlab.lab.plans.plan import PlanMachine, PlanShare

ROOT = Path(__file__).parents[4]
GUIDE = (ROOT / "docs/how-to/write-a-plan.md").read_text()
EXAMPLES = sorted((ROOT / "examples").rglob("*.vmlab.toml"))


def table(title: str) -> dict[str, str]:
    """The rows of the table with that title: the fields and what is said of them."""
    (rows,) = re.findall(
        rf"^\| {re.escape(title)} \| \|\n\| --- \| --- \|\n((?:\|.*\n)+)", GUIDE, re.MULTILINE
    )
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", rows, re.MULTILINE))


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("field of a plan", Plan),
        ("field of `machine`", PlanMachine),
        ("field of a share", PlanShare),
        ("field of a phase", Phase),
        ("field of a metric", MetricPattern),
        ("field of `matrix`", Matrix),
    ],
)
def test_every_field_is_in_the_guide_and_no_other(title: str, model: type[BaseModel]) -> None:
    fields = {field.alias or name for name, field in model.model_fields.items()}
    assert set(table(title)) == fields


def test_what_the_guide_says_of_values_is_so() -> None:
    assert f"{DEFAULT_TIMEOUT:g} if left out" in table("field of a phase")["timeout"]
    for name in Exclusion.model_fields:
        assert f"`{name}`" in table("field of `matrix`")["exclude"]
    for kind in ("auto", "9p", "virtiofs", "copy"):
        assert f'`"{kind}"`' in table("field of a share")["kind"]


@pytest.mark.parametrize("number", range(3))
def test_plans_in_the_guide_are_plans(number: int) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    assert Plan.parse(blocks[number]).phases


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_plans_whose_shares_are_there(path: Path) -> None:
    plan = Plan.load(path)
    assert plan.name
    assert all(share.source.is_dir() for share in plan.shares)
