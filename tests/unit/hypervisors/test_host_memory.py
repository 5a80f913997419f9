from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from vmlab.hypervisors.host_memory import HostMemory, host_memory

MEMINFO = """\
MemTotal:       16384000 kB
MemFree:          100000 kB
MemAvailable:    8192000 kB
HugePages_Total:       0
"""
V2 = "25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "33 24 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
TOTAL, AVAILABLE = 16384000 << 10, 8192000 << 10


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{str(text).rstrip()}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", MEMINFO)
    return tmp_path


def test_a_host_without_cgroups(root: Path) -> None:
    assert host_memory(root) == HostMemory(TOTAL, AVAILABLE)
    write(root / "proc/self/cgroup", "0::/\n")
    assert host_memory(root) == HostMemory(TOTAL, AVAILABLE), "no cgroups are mounted"


def test_no_limit_in_version_2(root: Path) -> None:
    write(root / "proc/self/mountinfo", V2)
    write(root / "proc/self/cgroup", "0::/user.slice/session")
    write(root / "sys/fs/cgroup/user.slice/session/memory.max", "max")
    assert host_memory(root) == HostMemory(TOTAL, AVAILABLE)


def test_the_tightest_of_all_cgroups_above_counts(root: Path) -> None:
    write(root / "proc/self/mountinfo", V2)
    write(root / "proc/self/cgroup", "0::/user.slice/session/mine")
    top = root / "sys/fs/cgroup"
    write(top / "user.slice/session/mine/memory.max", 4 << 30)
    write(top / "user.slice/session/mine/memory.current", 1 << 30)
    write(top / "user.slice/memory.max", 2 << 30)
    write(top / "user.slice/memory.current", 3 << 29)
    write(top / "memory.max", 8 << 30)
    found = host_memory(root)
    assert found.limit == 2 << 30
    assert found.limited_by == str(top / "user.slice")
    assert found.available == 1 << 29


def test_a_cgroup_that_is_beyond_its_limit_leaves_nothing(root: Path) -> None:
    write(root / "proc/self/mountinfo", V2)
    write(root / "proc/self/cgroup", "0::/")
    write(root / "sys/fs/cgroup/memory.max", 100)
    write(root / "sys/fs/cgroup/memory.current", 200)
    assert host_memory(root).available == 0


def test_version_1(root: Path) -> None:
    write(root / "proc/self/mountinfo", V1)
    write(root / "proc/self/cgroup", "5:cpu:/\n4:memory,x:/docker/abc\n1:name=systemd:/\n0::/")
    memory = root / "sys/fs/cgroup/memory"
    write(memory / "docker/abc/memory.limit_in_bytes", 9223372036854771712)
    assert host_memory(root).limit is None
    write(memory / "docker/abc/memory.limit_in_bytes", 1 << 30)
    write(memory / "docker/abc/memory.usage_in_bytes", 1 << 29)
    assert host_memory(root) == HostMemory(TOTAL, 1 << 29, 1 << 30, str(memory / "docker/abc"))


def test_in_a_container_only_the_top_can_be_seen(root: Path) -> None:
    write(root / "proc/self/mountinfo", V1)
    write(root / "proc/self/cgroup", "4:memory:/docker/abc")
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", 1 << 30)
    assert host_memory(root) == HostMemory(
        TOTAL, 1 << 30, 1 << 30, str(root / "sys/fs/cgroup/memory")
    )


def test_elsewhere_than_on_linux_psutil_tells(tmp_path: Path) -> None:
    found = host_memory(tmp_path)
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available < found.total
    write(tmp_path / "proc/meminfo", "MemTotal: many")
    assert host_memory(tmp_path).total == found.total


def test_this_host_has_memory() -> None:
    found = host_memory()
    assert 0 < found.available <= found.total
