"""`vmlab demo` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vmlab.report import read_run


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmlab", "demo", "--hours", "3", "--machines", "8"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_it_prints_a_table_the_seed_and_where_the_report_is(tmp_path):
    path = tmp_path / "sub" / "report.json"
    done = demo("--seed", "7", "--report", str(path))
    assert done.returncode == 0, done.stderr
    assert "HOST" in done.stdout and "host-3" in done.stdout
    assert "none had a wrong byte on its disk" in done.stdout
    assert f"report: {path}" in done.stdout
    assert "vmlab demo --seed 7" in done.stdout
    run = read_run(path)
    assert (run.seed, run.tool, run.totals.passed) == (7, "vmlab demo", 8)
    assert demo("--seed", "7", "--json", "--report", str(path)).stdout


def test_json_goes_to_stdout_alone_and_the_report_to_the_state_directory():
    done = demo("--seed", "9", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["seed"], facts["machines"], facts["mixed_up"]) == (9, 8, 0)
    assert Path(facts["report"]).is_file()
    assert len(facts["hosts"]) == 3
    assert done.stderr == ""


def test_a_seed_is_drawn_and_told():
    assert "again:  vmlab demo --seed " in demo().stdout
