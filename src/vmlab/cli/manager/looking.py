"""``vmlab list`` and ``vmlab show``: the manager's machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.manager.choice import kept_names
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.options import MachineArgument, ago, facts
from vmlab.cli.output import Column, JsonFlag
from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import MachineDocument, SnapshotDocument

__all__ = ["list_", "show"]

_COLUMNS = (
    Column("name", "machine", no_wrap=True),
    Column("state", "state", no_wrap=True),
    Column("host", "host"),
    Column("vcpus", "vCPUs", justify="right"),
    Column("memory_text", "memory", justify="right"),
    Column("addresses", "addresses"),
    Column("what", "made of"),
    Column("age", "age", justify="right"),
)


def list_(
    *,
    state: Annotated[str | None, typer.Option("--state", help="Only in this state.")] = None,
    label: Annotated[
        str | None, typer.Option("--label", "-l", help='Only with this label: "key=value", "key".')
    ] = None,
    host: Annotated[str | None, typer.Option("--host", "-H", help="Only on this host.")] = None,
    template: Annotated[
        str | None, typer.Option("--template", "-t", help="Only made of this template.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only their names.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the manager's machines."""

    async def asking(client: AsyncClient) -> tuple[MachineDocument, ...]:
        return await client.machines.list(state=state, label=label, host=host, template=template)

    machines = ask(asking)
    if quiet:
        for machine in machines:
            print(machine.name)
        return
    if as_json:
        output.print_json(list(machines))
        return
    output.print_table(
        _COLUMNS,
        [_row(machine) for machine in machines],
        as_json=False,
        empty="no machines; `vmlab launch --image debian-12-amd64-tiny` makes one",
    )
    if kept := kept_names():
        output.note(f"beside these, `vmlab run --keep` left {', '.join(kept)}")


def _row(machine: MachineDocument) -> dict[str, Any]:
    from vmlab.machine.sizes import rounded_size

    return {
        **facts(machine),
        "memory_text": rounded_size(machine.memory),
        "what": machine.template or machine.image or "a specification",
        "age": ago(machine.created),
    }


def show(name: MachineArgument, *, as_json: JsonFlag = False) -> None:
    """Show a machine: what is wanted of it, what it does, its disks, addresses, snapshots, use."""

    async def asking(
        client: AsyncClient,
    ) -> tuple[MachineDocument, tuple[SnapshotDocument, ...], dict[str, Any] | None]:
        machine = await client.machines.show(name)
        snapshots = await client.machines.snapshots(machine.id)
        metrics: dict[str, Any] | None = None
        if machine.state.is_live:
            try:
                metrics = (await client.machines.metrics(machine.id)).model_dump(mode="json")
            except VmlabError as error:
                output.note(f"what it uses is not known: {error}")
        return machine, snapshots, metrics

    machine, snapshots, metrics = ask(asking)
    if as_json:
        output.print_json(
            {**machine.model_dump(mode="json"), "snapshots": snapshots, "metrics": metrics}
        )
        return
    _print(machine, snapshots, metrics)
    if machine.state == "failed":
        output.note(
            f"`vmlab start {machine.name}` tries again, `vmlab delete {machine.name}` gives it up"
        )


def _print(
    machine: MachineDocument,
    snapshots: tuple[SnapshotDocument, ...],
    metrics: dict[str, Any] | None,
) -> None:
    from vmlab.machine.sizes import rounded_size

    lines: list[tuple[str, object]] = [
        ("machine", f"{machine.name} ({machine.id})"),
        ("state", machine.state.value + (f": {machine.reason}" if machine.reason else "")),
        ("wanted", machine.wanted),
        ("host", f"{machine.host} ({machine.hypervisor}, {machine.architecture})"),
        ("made of", machine.template or machine.image or "a specification"),
        ("vCPUs", machine.vcpus),
        ("memory", rounded_size(machine.memory)),
        ("labels", ", ".join(f"{key}={value}" for key, value in machine.labels.items())),
        ("policy", _policy(machine)),
        ("operation", machine.operation or ""),
        ("started", f"{ago(machine.started)} ago" if machine.started else ""),
        ("created", f"{ago(machine.created)} ago"),
    ]
    for disk in machine.disks:
        lines.append(("disk", f"{disk.name} ({rounded_size(disk.size)}, as {disk.device})"))
    for nic in machine.nics:
        addresses = ", ".join(nic.addresses) or "no address"
        lines.append(("NIC", f"{nic.name} on {nic.network}: {addresses} ({nic.mac})"))
    for snapshot in snapshots:
        kept = f", until {snapshot.expires:%Y-%m-%d %H:%M}" if snapshot.expires else ""
        what = "with memory" if snapshot.memory else "disks only"
        lines.append(("snapshot", f"{snapshot.name} ({what}, {ago(snapshot.created)} old{kept})"))
    used = metrics or {}
    if "cpu" in used:
        lines.append(("CPU time", f"{used['cpu']['seconds']:.1f} s"))
    if (used.get("memory") or {}).get("resident_bytes") is not None:
        lines.append(("resident", rounded_size(used["memory"]["resident_bytes"])))
    width = max(len(title) for title, value in lines if value != "")
    for title, value in lines:
        if value != "":
            print(f"{title:<{width}}  {value}")


def _policy(machine: MachineDocument) -> str:
    """What is looked after, in words."""
    policy = machine.policy
    said = ["starts with its manager"] if policy.autostart else []
    if policy.fallback:
        said.append(f"falls back to {', '.join(policy.fallback)}")
    if policy.snapshot_every is not None:
        said.append(f"snapshots every {policy.snapshot_every}, {policy.snapshot_keep} kept")
    said += [f"{code}: {action}" for code, action in policy.findings.items()]
    return "; ".join(said)
