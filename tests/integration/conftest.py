"""A project of a user's, for the tests that run pytest in one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.projects import Project


@pytest.fixture
def project() -> Iterator[Project]:
    # Not pytest's tmp_path: a unix socket's path may have 107 bytes and no more.
    base = Path(tempfile.mkdtemp(prefix="vmlab-p-"))
    yield Project(base)
    shutil.rmtree(base)
