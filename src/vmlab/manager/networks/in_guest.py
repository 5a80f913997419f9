"""What a guest that runs already is told of its addresses: shell text for its agent.

A copy of a running machine remembers the addresses of the first one, whichever way it got them.
They are taken off, its own are set, and its link goes down and up in between: whatever looks after
the interface in the guest (systemd-networkd, NetworkManager, dhcpcd) asks for its addresses anew
then, and is told the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vmlab.lab.networks import find_interface_script
from vmlab.manager.networks.seed import SeedNic

__all__ = ["addresses_script"]

_LOOKS: Final = 40
"""How often an interface is looked for, 20 times in a second: its MAC address was set just now."""

# An interface that is down is nobody's to set up. What it is reached by (a default route of IPv4)
# goes with its link; those of IPv6 come again with the router's next advertisement.
_SET: Final = """case $(ip link show dev "$n") in *[,\\<]UP[,\\>]*)
    r=$(ip -4 route show default dev "$n" | sed 's/ src [^ ]*//; s/ linkdown//; s/ dev [^ ]*//')
    ip addr flush dev "$n" && ip link set dev "$n" down || exit
{addresses}
    ip link set dev "$n" up || exit
    [ -z "$r" ] || printf '%s\\n' "$r" | while read -r route; do
        ip -4 route replace $route dev "$n" || exit
    done || exit
esac"""


def addresses_script(nics: Iterable[SeedNic]) -> str:
    """Shell text that gives each interface that is up the addresses of its NIC, and no others.

    Args:
        nics: Those with addresses are told; the others stay as they are.
    """
    return "\n".join(
        find_interface_script(nic.mac, tries=_LOOKS)
        + "\n"
        + _SET.format(
            addresses="\n".join(
                f'    ip addr add {address} dev "$n" || exit' for address in nic.addresses
            )
        )
        for nic in nics
        if nic.addresses
    )
