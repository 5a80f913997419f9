"""What the suite asks of QEMU fits the board that it is asked of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vmlab.conformance.qemu_profile import make_profile
from vmlab.hypervisors.qemu.boards import BOARDS
from vmlab.images import ImageStore
from vmlab.machine.architecture import Architecture


@pytest.mark.parametrize("architecture", list(BOARDS))
def test_disks_that_have_to_go_are_on_a_bus_that_lets_them(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = SimpleNamespace(kernel=Path("/kernel"), initrd=Path("/initrd"), cmdline="quiet")
    monkeypatch.setattr(ImageStore, "ensure", lambda self, name: image)
    profile = make_profile(architecture)
    buses = {profile.bus, *(disk.bus for disk in profile.spec.disks)}
    # Where there is no PCI hot-plug only disks of the SCSI host come and go.
    assert buses == {"scsi"} or BOARDS[architecture].hotplug == "port"
