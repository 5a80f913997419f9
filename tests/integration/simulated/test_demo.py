"""`vmlab demo --simulated` as a user runs it, and what `vmlab demo` refuses to begin with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vmlab.report import read_run


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmlab", "demo", "--simulated", "--hours", "3"]
    command += ["--machines", "8"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=250, check=False
    )


def test_it_prints_a_table_the_seed_and_where_the_report_is(tmp_path):
    path = tmp_path / "sub" / "report.json"
    done = demo("--seed", "7", "--report", str(path))
    assert done.returncode == 0, done.stderr
    assert "HOST" in done.stdout and "host-3" in done.stdout
    assert "none had a wrong byte on its disk" in done.stdout
    assert f"report: {path}" in done.stdout
    assert "vmlab demo --simulated --seed 7" in done.stdout
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
    assert "again:  vmlab demo --simulated --seed " in demo().stdout


def test_what_belongs_to_the_other_kind_of_demo_is_refused_by_name():
    done = demo("--image", "debian-12-amd64-tiny")
    assert done.returncode == 2 and "--image: leave it out" in done.stderr
    command = [sys.executable, "-m", "vmlab", "demo", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2 and "--seed = 7: needs --simulated" in done.stderr


def test_examples_that_are_not_there_are_told_before_anything_boots():
    command = [sys.executable, "-m", "vmlab", "demo", "--examples", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 3 and "/nowhere" in done.stderr and "hint:" in done.stderr
