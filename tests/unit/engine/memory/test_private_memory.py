"""What a fork does not share: guest memory that was made private, and the process's own tables."""

from __future__ import annotations

import os
import subprocess
import sys

from vmlab.engine.memory.ram import PAGE_SIZE, RAM_BASE, Ram

FORKS = """
import os
from vmlab.engine.memory.pages import own_memory
from vmlab.engine.memory.ram import PAGE_SIZE, RAM_BASE, Ram
ram, own = Ram(4 * PAGE_SIZE), own_memory(100)
ram.write(RAM_BASE, b"template")
ram.make_private()
ram.write(RAM_BASE + PAGE_SIZE, b"parent")
def shown(): return [ram.read(RAM_BASE + page * PAGE_SIZE, 8) for page in range(3)] + [own[:5]]
to_child, from_parent = os.pipe()[::-1]
if os.fork() == 0:
    os.read(from_parent, 1)
    before = shown()
    ram.write(RAM_BASE, b"ofachild")
    own[:5] = b"child"
    print("child", before, shown(), flush=True)
    os._exit(0)
ram.write(RAM_BASE + 2 * PAGE_SIZE, b"later")
own[:5] = b"later"
os.write(to_child, b"x")
os.wait()
print("parent", shown(), os.pread(ram.fd, 8, PAGE_SIZE))
"""


def test_private_memory_leaves_its_file_as_it_was() -> None:
    ram = Ram(4 * PAGE_SIZE)
    try:
        ram.write(RAM_BASE, b"before")
        place = ram.host_address
        ram.make_private()
        ram.make_private()
        assert (ram.private, ram.host_address) == (True, place)
        assert ram.read(RAM_BASE, 6) == b"before"
        ram.write(RAM_BASE, b"after!")
        assert ram.read(RAM_BASE, 6) == b"after!"
        assert ram.load16(RAM_BASE) == int.from_bytes(b"af", "little")
        assert os.pread(ram.fd, 6, 0) == b"before"
        ram.discard(RAM_BASE + PAGE_SIZE, PAGE_SIZE)
    finally:
        ram.close()


def test_neither_side_of_a_fork_sees_what_the_other_writes() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    nothing = bytes(8)
    before = [b"template", b"parent\0\0", nothing, bytes(5)]
    child = [b"ofachild", b"parent\0\0", nothing, b"child"]
    parent = [b"template", b"parent\0\0", b"later\0\0\0", b"later"]
    assert done.stdout.splitlines() == [
        f"child {before} {child}",
        f"parent {parent} {nothing!r}",
    ]
