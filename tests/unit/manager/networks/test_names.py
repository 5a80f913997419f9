from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.machine.fields import is_name
from vmlab.manager.networks import names

ID = "0123456789abcdef" * 2
HOME = names.digest(Path("/somewhere"))
KINDS = ("bridge", "port", "switch")


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_interfaces_fit_the_kernel_and_the_specification(kind: str) -> None:
    name = names.interface(kind, ID)
    assert len(name) <= 15
    assert is_name(name)


def test_kinds_of_interfaces_of_one_id_have_names_of_their_own() -> None:
    assert len({names.interface(kind, ID) for kind in KINDS}) == len(KINDS)


def test_an_alias_tells_the_network_to_its_own_home_alone() -> None:
    text = names.alias(HOME, ID)
    assert names.of_alias(HOME, text) == ID
    assert names.of_alias(names.digest(Path("/elsewhere")), text) is None


@pytest.mark.parametrize("text", [None, "", "uplink", "vmlab", "vmlab a b", f"vmlab {HOME}"])
def test_what_somebody_else_says_of_an_interface_is_no_alias(text: str | None) -> None:
    assert names.of_alias(HOME, text) is None


def test_names_of_segments_and_tables_are_told_apart_by_home_and_id() -> None:
    assert is_name(names.segment(ID))
    assert names.table(HOME, ID).startswith(names.tables(HOME))
    assert names.table(HOME, ID).removeprefix(names.tables(HOME)) == ID
