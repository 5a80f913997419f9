"""Refuse a test run that left too much of a package untested.

Reads the coverage data that the test run left and `[tool.vmlab.coverage-gate]` of pyproject.toml:
a folder under src beside the percentage that its lines and its branches must each reach.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import coverage_data

ROOT = Path(__file__).resolve().parent.parent


def measured_shares(report: dict[str, object], folder: str) -> tuple[float, float]:
    """Percentages of lines and of branches covered in `folder` (below src) by coverage's JSON.

    Raises ValueError where the report has no file of that folder.
    """
    files = report["files"]
    assert isinstance(files, dict)
    summaries = [
        entry["summary"]
        for name, entry in files.items()
        if f"src/{folder}/" in Path(name).as_posix()
    ]
    if not summaries:
        raise ValueError(f"no file below src/{folder} was measured")

    def share(covered: str, total: str) -> float:
        of = sum(summary[total] for summary in summaries)
        return 100.0 * sum(summary[covered] for summary in summaries) / of if of else 100.0

    return share("covered_lines", "num_statements"), share("covered_branches", "num_branches")


def failures(report: dict[str, object], gate: dict[str, float]) -> list[str]:
    """Print each package's shares; returns one sentence for each share that is too small."""
    problems = []
    for folder, required in gate.items():
        lines, branches = measured_shares(report, folder)
        print(f"coverage of {folder}: lines {lines:.1f}%, branches {branches:.1f}%")
        for what, share in (("lines", lines), ("branches", branches)):
            if share < required:
                problems.append(f"{folder}: {share:.2f}% of {what} covered, {required}% required")
    return problems


def main() -> int:
    """Exit status 1 where a share is below the gate, or what was measured is lost."""
    # coverage combines what is still there, of processes that outlived the test run.
    coverage_data.take_out_unfinished(ROOT / ".coverage", print)
    if losses := coverage_data.lost(ROOT / ".coverage"):
        for loss in losses:
            print(f"error: {loss}", file=sys.stderr)
        print("hint: was the disk full? `make test` measures anew", file=sys.stderr)
        return 1
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    gate = settings["tool"]["vmlab"]["coverage-gate"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        subprocess.run(
            [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(path)],
            check=True,
            cwd=ROOT,
        )
        report = json.loads(path.read_text())
    problems = failures(report, gate)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print("hint: `make coverage` shows which lines and branches in htmlcov/", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
