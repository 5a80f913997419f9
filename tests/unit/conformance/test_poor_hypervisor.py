"""A hypervisor that can do little, and says so, passes all that is asked of it."""

from __future__ import annotations

from pathlib import Path

from mutants.base import PROFILE

from vmlab.conformance.registry import checks
from vmlab.conformance.runner import Subject, run_check
from vmlab.hypervisors.simulated import provider

POOR = """
extends = "standard"
architectures = ["x86_64"]
without = [
    "fork", "live-migration", "cold-migration", "hotplug-nic", "hotplug-vcpu", "hotplug-memory",
    "memory-snapshot", "pinning", "numa", "resize", "resize-disk", "deterministic",
]
"""


def test_what_is_not_declared_is_skipped_with_the_reason_and_the_rest_passes(
    tmp_path: Path,
) -> None:
    (tmp_path / "poor.toml").write_text(POOR)
    subject = Subject(provider, PROFILE.with_changes(must_declare=frozenset())).with_options(
        {"profile": str(tmp_path / "poor.toml")}
    )
    results = {id_: run_check(check, subject) for id_, check in checks().items()}
    wrong = {id_: result.reason for id_, result in results.items() if result.findings}
    assert wrong == {}
    skipped = {id_: result.reason for id_, result in results.items() if result.reason}
    assert "does not declare fork" in skipped["fork.independent"]
    assert len(results) - len(skipped) > 40
