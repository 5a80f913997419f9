"""A file system that is nearly full: a small one of the test's own, in a mount namespace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STORY = """
import asyncio, os, sys
from pathlib import Path

from vmlab.hypervisors.ownership import Home
from vmlab.manager.manager import Manager
from vmlab.manager.settings import HostSetting, Settings

MIB = 1 << 20


async def story(home: Path) -> None:
    hosts = (HostSetting(name="simulated", hypervisor="simulated"),)
    settings = Settings(home=Home.open(home), hosts=hosts, sweep_seconds=86400)
    async with await Manager.open(settings) as manager:
        assert await manager.observer.sweep() == []
        facts = os.statvfs(home)
        much = home / "much"
        much.write_bytes(bytes(facts.f_bavail * facts.f_frsize - 10 * MIB))
        (finding,) = await manager.observer.sweep()
        assert (finding.code, finding.severity) == ("storage-low", "critical"), finding
        assert finding.subject == str(settings.directory)
        assert finding.evidence["size"] == 128 * MIB
        assert 0 < finding.evidence["free"] <= 10 * MIB
        assert finding.actions == ()
        much.unlink()
        assert await manager.observer.sweep() == []


asyncio.run(story(Path(sys.argv[1])))
print("told")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a file system of its own")
def test_a_file_system_that_is_nearly_full_is_found_and_that_it_has_room_again(directory):
    mounted = 'mount -t tmpfs -o size=128m,mode=700 vmlab-test "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", mounted, "sh"]
    told = subprocess.run(
        [*words, str(directory), sys.executable, STORY],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (told.returncode, told.stdout) == (0, "told\n"), told.stderr
