"""stress-ng and fio in a guest on the engine, which check what they compute and read back.

The image is that of stress.toml, built from the Debian archive at the first call; the figures go
where VMLAB_RESULTS says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.figures import note
from tests.integration.engine.guest import Guest, start

pytestmark = [pytest.mark.boots, pytest.mark.soak, pytest.mark.timeout(0)]

IMAGE = str(Path(__file__).with_name("stress.toml"))
SECONDS = int(os.environ.get("VMLAB_STRESS_SECONDS", "20"))
FIGURES = "engine-stress.json"
PATIENCE = 3600
MEBIBYTE = 1 << 20

# What checks its own results: arithmetic, memory, processes, time, and the kernel under them.
STRESSORS = (
    "cpu", "matrix", "vecmath", "fp", "bitops", "crypt", "hash", "qsort", "bsearch",
    "tree", "str", "vm", "memcpy", "mmap", "malloc", "stack", "context", "switch", "futex",
    "mutex", "sem", "pipe", "fork", "vfork", "clone", "pthread", "signal", "sigsegv", "sigfpe",
    "timer", "timerfd", "nanosleep", "clock", "yield", "atomic", "lockbus", "prime", "longjmp",
    "icache", "judy", "zlib", "branch", "funccall", "jpeg", "regs", "goto", "mergesort",
)  # fmt: skip


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("s")
    with (folder / "d.raw").open("wb") as disk:
        disk.truncate(256 * MEBIBYTE)
    disks = "[[disks]]\nname = 'data'\nfile = 'd.raw'\n"
    made = start(folder, 2, disks, image=IMAGE, megabytes=1024, patience=PATIENCE)
    yield made
    made.close()


@pytest.mark.parametrize("stressor", STRESSORS)
def test_stress_ng_finds_no_fault(guest: Guest, stressor: str) -> None:
    command = (
        f"stress-ng --{stressor} 2 --verify -t {SECONDS} --timestamp --metrics --temp-path /tmp"
    )
    said = guest.run(f"{command} 2>&1 || {{ echo FAILED $?; true; }}")
    assert "FAILED" not in said and "fail:" not in said, said
    assert "successful run completed" in said, said
    figures = {"seconds": SECONDS, "harts": 2, "outcome": "no fault"}
    note(FIGURES, f"stress-ng {stressor}", figures)


@pytest.mark.parametrize("engine", ["psync", "libaio"])
@pytest.mark.parametrize("pattern", ["write", "randwrite", "randrw"])
def test_fio_reads_back_what_it_wrote(guest: Guest, engine: str, pattern: str) -> None:
    command = (
        f"fio --name=v --filename=/dev/vda --rw={pattern} --bs=4k-64k --size=128M --direct=1 "
        f"--ioengine={engine} --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 "
        "--verify_state_save=0 --output-format=json"
    )
    said = guest.run(command)
    (job,) = json.loads(said[said.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] > 32 * MEBIBYTE
    assert job["read"]["io_bytes"] >= job["write"]["io_bytes"] // 2
    figures = {"bytes": job["write"]["io_bytes"], "outcome": "no fault"}
    note(FIGURES, f"fio {engine} {pattern}", figures)


def test_the_kernel_has_nothing_to_complain_of(guest: Guest) -> None:
    complaints = guest.run("dmesg | grep -E 'Oops|BUG|WARNING|rcu.*stall|hung task' || true")
    assert complaints == ""
