"""What a machine of its own costs a test: wall seconds of trivial guest tests, forked and booted.

A test of one command (`true`) is run many times by pytest with vmlab's plugin on QEMU's TCG, each
with a machine of its own: forked from a template, and every so often booted instead, in turns. The
overhead is all of setup, call and teardown. The template's own boot is told apart: it is paid once.

    python benchmarks/lab_overhead.py [--count 200] [--booted 10] [--image NAME] [--limit 1.0]

The table is printed and written to `results/lab-overhead.json`, unless `--results` names a file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES_LESS = 4.0
"""How much less a fork has to cost than a boot; the promise was made when a boot took over 4 s."""

_TESTS = """
import pytest

@pytest.mark.parametrize("number", range({count}))
@pytest.mark.vm(image={image!r}, memory={memory!r}, scope="session")
def test_forked(number, vm_factory):
    vm_factory(template=True).succeed("true")

@pytest.mark.parametrize("number", range({booted}))
@pytest.mark.vm(image={image!r}, memory={memory!r}, scope="session")
def test_booted(number, vm_factory):
    vm_factory(template=False).succeed("true")
"""

# Runs the booted ones among the forked, and writes down what each test took in all its phases.
_HOOKS = """
import json, os
from collections import defaultdict

taken, failed = defaultdict(float), []

def pytest_collection_modifyitems(items):
    forked = [item for item in items if "test_forked" in item.name]
    booted = [item for item in items if "test_booted" in item.name]
    every = max(1, len(forked) // max(1, len(booted)))
    order = []
    for position, item in enumerate(forked, 1):
        order.append(item)
        if position % every == 0 and booted:
            order.append(booted.pop(0))
    items[:] = order + booted

def pytest_runtest_logreport(report):
    taken[report.nodeid] += report.duration
    if report.failed:
        failed.append(report.nodeid)

def pytest_sessionfinish(session):
    with open(os.environ["LAB_OVERHEAD"], "w") as file:
        json.dump({"taken": taken, "failed": failed}, file)
"""


def measured(arguments: argparse.Namespace, place: Path) -> tuple[list[float], list[float]]:
    """Seconds of each forked and of each booted test, in the order in which they ran."""
    wish = {"count": arguments.count, "booted": arguments.booted}
    text = _TESTS.format(**wish, image=arguments.image, memory=arguments.memory)
    (place / "test_overhead.py").write_text(text)
    (place / "conftest.py").write_text(_HOOKS)
    (place / "pytest.ini").write_text("[pytest]\n")
    environment = {
        **os.environ, "LAB_OVERHEAD": str(place / "taken.json"), "VMLAB_HOME": str(place / "home"),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--vm-hypervisor=qemu", str(place)]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"pytest ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    taken = json.loads((place / "taken.json").read_text())["taken"]
    forked = [seconds for name, seconds in taken.items() if "test_forked" in name]
    booted = [seconds for name, seconds in taken.items() if "test_booted" in name]
    return forked, booted


def row(name: str, took: list[float]) -> dict[str, object]:
    """A line of the table: seconds, but for the number of tests."""
    ordered = sorted(took)
    return {
        "tests": name,
        "count": len(took),
        "p50": round(statistics.median(took), 3),
        "p95": round(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)], 3),
        "least": round(ordered[0], 3),
        "most": round(ordered[-1], 3),
    }


def main() -> int:
    """Print and write the table; exit status 1 where a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--booted", type=int, default=10)
    parser.add_argument("--image", default="debian-12-amd64-tiny")
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds, p50 of the forked ones")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "lab-overhead.json"
    )
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lab-") as place:
        forked, booted = measured(arguments, Path(place))
    # The first one waits for the template.
    rows = [row("forked", forked[1:]), row("booted", booted), row("first", forked[:1])]
    print(f"{'tests':8} {'count':>6} {'p50 s':>8} {'p95 s':>8} {'least':>8} {'most':>8}")
    for line in rows:
        print(
            f"{line['tests']:8} {line['count']:>6} {line['p50']:>8} {line['p95']:>8} "
            f"{line['least']:>8} {line['most']:>8}"
        )
    print(f"the first one boots the template; p50 of the forked: at most {arguments.limit} s")
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "image": arguments.image,
        "memory": arguments.memory,
        "cpus": os.cpu_count(),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "rows": rows,
    }
    arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    kept = statistics.median(forked[1:]) <= arguments.limit
    times = statistics.median(booted) / statistics.median(forked[1:])
    print(f"a boot costs {times:.1f} times as much as a fork; at least {TIMES_LESS:.0f}")
    return 0 if kept and times >= TIMES_LESS else 1


if __name__ == "__main__":
    sys.exit(main())
