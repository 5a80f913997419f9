"""``vmlab network``: networks that machines are on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vmlab.cli import output
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import AddressDocument, NetworkDocument

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Networks of the manager's, and their addresses.",
)

NetworkArgument = Annotated[
    str, typer.Argument(help="Name or id of a network.", autocompletion=completed("networks"))
]

_COLUMNS = (
    Column("name", "network", no_wrap=True),
    Column("mode", "mode"),
    Column("subnet", "IPv4"),
    Column("subnet6", "IPv6"),
    Column("vlan", "VLAN", justify="right"),
    Column("bridge", "bridge"),
    Column("used", "used", justify="right"),
    Column("free", "free", justify="right"),
)
_ADDRESSES = (
    Column("address", "address", no_wrap=True),
    Column("machine", "machine"),
    Column("nic", "NIC"),
    Column("mac", "MAC"),
    Column("since", "since"),
)


@app.command("list")
def list_(*, as_json: JsonFlag = False) -> None:
    """List networks."""

    async def asking(client: AsyncClient) -> tuple[NetworkDocument, ...]:
        return await client.networks.list()

    output.print_table(
        _COLUMNS,
        [network.model_dump(mode="json") for network in ask(asking)],
        as_json=as_json,
        empty="no networks; `vmlab network create lan --subnet 10.7.0.0/24` makes one",
    )


@app.command()
def show(network: NetworkArgument, *, as_json: JsonFlag = False) -> None:
    """Show a network and its addresses that are taken."""

    async def asking(
        client: AsyncClient,
    ) -> tuple[NetworkDocument, tuple[AddressDocument, ...]]:
        found = await client.networks.show(network)
        return found, await client.networks.addresses(found.id)

    found, addresses = ask(asking)
    rows: list[dict[str, Any]] = [each.model_dump(mode="json") for each in addresses]
    if as_json:
        output.print_json({**found.model_dump(mode="json"), "addresses": rows})
        return
    output.print_table(_COLUMNS, [found.model_dump(mode="json")], as_json=False)
    print()
    output.print_table(_ADDRESSES, rows, as_json=False, empty="no address is taken")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    *,
    mode: Annotated[
        Literal["isolated", "user", "bridged"] | None,
        typer.Option(
            "--mode",
            help="isolated: machines among each other, no root needed; user: NAT, no root "
            "needed; bridged: on a bridge of the host, which takes root. isolated if left out.",
        ),
    ] = None,
    subnet: Annotated[
        str | None, typer.Option("--subnet", help='IPv4 addresses, such as "10.7.0.0/24".')
    ] = None,
    subnet6: Annotated[
        str | None, typer.Option("--subnet6", help='IPv6 addresses, such as "fd07::/64".')
    ] = None,
    gateway: Annotated[
        str | None, typer.Option("--gateway", help="The first address if left out.")
    ] = None,
    dns: Annotated[
        list[str] | None, typer.Option("--dns", help="DNS server to tell of; repeatable.")
    ] = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="FIRST-LAST", help="Addresses to give; repeatable."),
    ] = None,
    reserved: Annotated[
        list[str] | None, typer.Option("--reserve", help="Address never to give; repeatable.")
    ] = None,
    vlan: Annotated[int | None, typer.Option("--vlan", help="VLAN tag.")] = None,
    bridge: Annotated[
        str | None, typer.Option("--bridge", help="Bridge of the host; an own one if left out.")
    ] = None,
    dhcp: Annotated[bool | None, typer.Option("--dhcp/--no-dhcp", help="Give by DHCP.")] = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a network; prints its name."""
    wanted = request(
        "CreateNetwork",
        name=name,
        mode=mode,
        subnet=subnet,
        subnet6=subnet6,
        gateway=gateway,
        dns=tuple(dns or ()),
        ranges=tuple(ranges or ()),
        reserved=tuple(reserved or ()),
        vlan=vlan,
        bridge=bridge,
        dhcp=dhcp,
    )

    def told(operation: object) -> str:
        output.note(f"next: `vmlab launch --image debian-12-amd64-tiny --network {name}`")
        return name

    return change([wanted], How(wait, dry_run, as_json), told)


@app.command()
def delete(
    networks: Annotated[
        list[str], typer.Argument(help="Names or ids.", autocompletion=completed("networks"))
    ],
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Remove networks that no machine is on."""
    return change(
        [request("DeleteNetwork", network=network) for network in networks],
        How(wait, dry_run, as_json),
        lambda operation: f"{operation.target_name or operation.target} is gone",
    )
