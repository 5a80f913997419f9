"""The bus of the guest channels had 511 ports: reading one cost the guest three times the CPU time.

Linux has two virtqueues for each port that a virtio-serial bus may have, and looks through all of
them at each interrupt (drivers/virtio/virtio_pci_common.c, `vp_vring_interrupt`).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from vmlab.guests.agent import CHANNELS
from vmlab.hypervisors.qemu.boards import BOARDS
from vmlab.hypervisors.qemu.command_line import Launch, arguments
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.machine.spec import MachineSpec


def ports_of(channels: tuple[str, ...], virtio_consoles: int) -> int:
    """How many ports the bus of such a machine has."""
    spec = MachineSpec.of(
        name="m",
        architecture="x86_64",
        channels=channels,
        consoles=[{"name": "serial", "kind": "serial"}]
        + [{"name": f"v{number}", "kind": "virtio"} for number in range(virtio_consoles)],
    )
    words = arguments(
        Launch(
            id="0123456789abcdef0123456789abcdef",
            spec=spec,
            accelerator="tcg",
            layout=Layout.of(spec, BOARDS[spec.architecture]),
            disks=(),
            netdevs=(),
            logs=Path("/logs"),
            program="qemu-system-x86_64",
        )
    )
    buses = [
        value
        for option, value in pairwise(words)
        if option == "-device" and value.startswith("virtio-serial-pci")
    ]
    (bus,) = buses
    return int(bus.partition("max_ports=")[2])


@pytest.mark.parametrize("virtio_consoles", [0, 1, 3])
@pytest.mark.parametrize("channels", [(), ("one",), CHANNELS])
def test_bus_has_port_0_and_the_ports_that_are_used(
    channels: tuple[str, ...], virtio_consoles: int
) -> None:
    # With one port alone it is a console (virtio 1.2, 5.3.3: VIRTIO_CONSOLE_F_MULTIPORT).
    assert ports_of(channels, virtio_consoles) == max(2, 1 + len(channels) + virtio_consoles)
