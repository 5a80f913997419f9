"""The whole conformance suite through the command, as a user would run it, and its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.figures import write

UNPROVEN = "declared, and no check of it ran"


def whole_suite(
    hypervisor: str, store: Path, folder: Path, *, architecture: str, words: Sequence[str] = (),
    checks: Sequence[str] = (),
) -> None:  # fmt: skip
    """Run it, write its figures to where VMLAB_RESULTS says, and have nothing fail.

    Args:
        hypervisor: Its name.
        store: Where images are.
        folder: For its home and its report.
        architecture: Of the guests.
        words: More of the command.
        checks: Patterns of the checks that have to pass; none is all, and all that is declared
            has to be proven.
    """
    report = folder / "report.json"
    command = [sys.executable, "-m", "vmlab", "conformance", hypervisor, "--json", str(report)]
    command += [*words, *(f"--select={pattern}" for pattern in checks)]
    environment = {
        **os.environ,
        "VMLAB_HOME": str(folder / "home"),
        "VMLAB_IMAGE_STORE": str(store),
    }
    begun = time.time()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(report.read_text())
    skipped = {
        test["name"]: test["attempts"][-1]["skip_reason"]
        for suite in found["suites"]
        for test in suite["tests"]
        if test["attempts"][-1]["outcome"] == "skip"
    }
    figures = {
        "hypervisor": hypervisor,
        "architecture": architecture,
        "checks": list(checks) or "all",
        "date": time.strftime("%Y-%m-%d", time.gmtime(begun)),
        "minutes": round((time.time() - begun) / 60, 1),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[1], 1),
        **{name: count for name, count in found["totals"].items() if count},
        "capabilities": [each["text"] for each in found["messages"]],
        "skipped": skipped,
    }
    write(f"conformance-{hypervisor}-{architecture}.json", figures)
    assert ended.returncode == 0, f"{figures}\n{ended.stdout}\n{ended.stderr}"
    if not checks:
        left = [each["text"] for each in found["messages"] if UNPROVEN in each["text"]]
        assert left == [], "what is declared is proven by checks that run"
