"""Hypervisors that break one clause of the contract each, to show that the suite notices.

Each is the simulated hypervisor with one thing wrong, and names the check or audit that has to
find it; all but a few are found by that one alone, so that the suite would be weaker without it.
"""

from __future__ import annotations

import importlib
import pkgutil

from mutants.base import MUTANTS, Mutant

__all__ = ["Mutant", "mutants"]


def mutants() -> list[Mutant]:
    """All of them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return list(MUTANTS)
