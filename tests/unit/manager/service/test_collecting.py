"""A manager's process looks for garbage rarely, and nobody else's does."""

from __future__ import annotations

import gc

import pytest

from vmlab.manager.service.collecting import collected_rarely, settled


def test_thresholds_are_higher_within_and_as_they_were_afterwards() -> None:
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError), collected_rarely():
        assert gc.isenabled()
        assert all(now >= then for now, then in zip(gc.get_threshold(), before, strict=True))
        assert gc.get_threshold()[0] > 10 * before[0]
        raise ZeroDivisionError
    assert gc.get_threshold() == before


def test_objects_of_a_sweep_outlive_no_look() -> None:
    looks: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            looks.append(info["generation"])

    with collected_rarely():
        gc.collect()
        gc.callbacks.append(note)
        try:
            kept = [[number] for number in range(100_000)]
            del kept
        finally:
            gc.callbacks.remove(note)
    assert set(looks) <= {0}


def test_what_is_settled_is_looked_at_no_more_until_the_end() -> None:
    frozen = gc.get_freeze_count()
    with collected_rarely():
        kept = [[]]
        settled()
        assert gc.get_freeze_count() > frozen
        assert all(each is not kept for each in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(each is kept for each in gc.get_objects())
