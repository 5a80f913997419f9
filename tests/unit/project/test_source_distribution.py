"""What the source distribution has, and what it leaves on the machine that makes it."""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.sdist import SdistBuilder

ROOT = Path(__file__).parents[3]


def test_examples_are_in_the_source_distribution_and_what_was_built_of_them_is_not() -> None:
    config = SdistBuilder(str(ROOT)).config
    assert config.include_path("examples/quickstart/ledger.c")
    assert config.include_path("examples/quickstart/test_ledger.py")
    assert not config.include_path("examples/quickstart/build/ledger-x86_64")
