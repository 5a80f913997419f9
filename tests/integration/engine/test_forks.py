"""A machine with Debian is forked while it boots, idles and computes; all of them go on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.store import IMAGE_STORE

from vmlab.images import ImageStore

pytestmark = [pytest.mark.boots, pytest.mark.timeout(3600)]


def test_a_machine_is_forked_at_any_moment_and_both_go_on() -> None:
    image = ImageStore(IMAGE_STORE).ensure("debian-13-riscv64-tiny")
    program = Path(__file__).with_name("forking.py")
    arguments = [image.kernel, image.initrd, image.cmdline, "2"]
    done = subprocess.run(
        [sys.executable, program, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0
    numbers = "".join(f"{number}\n" for number in range(1, 20_001))
    digest = hashlib.md5(numbers.encode()).hexdigest()
    told = {each["side"]: each["answer"] for each in map(json.loads, done.stdout.splitlines())}
    sides = ["booting-child", "idle-child", "computing-child", "parent"]
    assert told == {side: [digest, "-", side] for side in sides}
