"""What is public of the lab can be had from its package, and costs nothing until it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vmlab.lab


@pytest.mark.parametrize("name", vmlab.lab.__all__)
def test_public_names_are_classes_of_the_lab(name: str) -> None:
    assert getattr(vmlab.lab, name).__module__.startswith("vmlab.lab.")


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = vmlab.lab.Nothing  # type: ignore[attr-defined]  # that is what is tested


def test_the_package_alone_imports_nothing_of_it() -> None:
    code = "import sys, vmlab.lab; print(*[name for name in sys.modules if 'vmlab.lab.' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
