"""Machine files: their paths."""

from __future__ import annotations

from pathlib import Path

from vmlab.engine.configuration import SegmentKind, load

FILE = """
name = "vm"
memory = 1048576
qmp = "q.sock"

[boot]
kernel = "Image"
initrd = "/boot/initrd.img"
firmware = ""

[[nics]]
name = "a"
mac = "52:54:00:00:00:01"
segment = "stream-client"
path = "segment.sock"

[[nics]]
name = "b"
mac = "52:54:00:00:00:02"
segment = "multicast"
path = "239.1.2.3:20000"

[[nics]]
name = "c"
mac = "52:54:00:00:00:03"
segment = "tap"
path = "tap0"
"""


def test_relative_paths_are_seen_from_the_file_and_an_empty_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(FILE)
    made = load(tmp_path / "m.toml")
    assert made.qmp == f"{tmp_path}/q.sock"
    assert made.boot.kernel == f"{tmp_path}/Image"
    assert made.boot.initrd == "/boot/initrd.img"
    assert made.boot.firmware is None


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(FILE)
    nics = load(tmp_path / "m.toml").nics
    assert [(nic.segment, nic.path) for nic in nics] == [
        (SegmentKind.STREAM_CLIENT, f"{tmp_path}/segment.sock"),
        (SegmentKind.MULTICAST, "239.1.2.3:20000"),
        (SegmentKind.TAP, "tap0"),
    ]
