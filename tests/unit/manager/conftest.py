"""What holds for all tests of the manager: hypervisors have time to answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.patience import patient


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    with patient():
        yield
