"""``vmlab start``, ``stop``, ``pause``, ``resume``, ``restart``, ``update``, ``resize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli.manager import options
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.making import (
    CpusOption,
    EveryOption,
    FallbackOption,
    FindingsOption,
    HostnameOption,
    KeepOption,
    KeysOption,
    LabelsOption,
    MemoryOption,
    ReleaseOption,
    UserDataOption,
)
from vmlab.cli.manager.options import MachineArgument, MachinesArgument
from vmlab.cli.output import JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import MachineDocument, OperationDocument

__all__ = ["pause", "resize", "restart", "resume", "start", "stop", "update"]

GracefulOption = Annotated[
    bool, typer.Option("--force", "-f", help="Do not ask the guest first: end it at once.")
]


def _each(kind: str, names: list[str], how: How, done: str, **fields: object) -> int:
    """One request of a kind for each machine."""

    def told(operation: OperationDocument) -> str:
        return f"{operation.target_name or operation.target} {done}"

    return change([request(kind, machine=name, **fields) for name in names], how, told)


def start(
    names: MachinesArgument,
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Boot machines."""
    return _each("StartMachine", names, How(wait, dry_run, as_json), "runs")


def stop(
    names: MachinesArgument,
    *,
    force: GracefulOption = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", help="Seconds that the guest is given before its process ends."),
    ] = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Shut machines down: the guest is asked, then its process is ended, then killed."""
    how = How(wait, dry_run, as_json)
    return _each("StopMachine", names, how, "is stopped", graceful=not force, timeout=timeout)


def pause(
    names: MachinesArgument,
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Stop machines' vCPUs; `vmlab resume` lets them run on."""
    return _each("PauseMachine", names, How(wait, dry_run, as_json), "is paused")


def resume(
    names: MachinesArgument,
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Let paused machines run on."""
    return _each("ResumeMachine", names, How(wait, dry_run, as_json), "runs on")


def restart(
    names: MachinesArgument,
    *,
    force: GracefulOption = False,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Boot machines again."""
    how = How(wait, dry_run, as_json)
    return _each("RestartMachine", names, how, "has been restarted", graceful=not force)


def resize(
    name: MachineArgument,
    *,
    cpus: CpusOption = None,
    memory: MemoryOption = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Change a machine's vCPUs and memory, running where its hypervisor can."""
    if cpus is None and memory is None:
        raise options.wrong("resize", name, "--cpus, --memory or both", command="resize")
    how = How(wait, dry_run, as_json)
    return _each("ResizeMachine", [name], how, "is resized", vcpus=cpus, memory=memory)


def update(
    name: MachineArgument,
    *,
    rename: Annotated[str | None, typer.Option("--name", help="Call it this from now on.")] = None,
    label: LabelsOption = None,
    unlabel: Annotated[
        list[str] | None, typer.Option("--unlabel", help="Take a label away; repeatable.")
    ] = None,
    autostart: Annotated[
        bool | None,
        typer.Option(
            "--autostart/--no-autostart",
            help="Start it again when its manager begins, unless somebody stopped it.",
        ),
    ] = None,
    fallback: FallbackOption = None,
    release: ReleaseOption = None,
    on: FindingsOption = None,
    snapshot_every: EveryOption = None,
    no_snapshots: Annotated[
        bool, typer.Option("--no-snapshots", help="Take no more snapshots by a schedule.")
    ] = False,
    snapshot_keep: KeepOption = None,
    hostname: HostnameOption = None,
    user_data: UserDataOption = None,
    ssh_key: KeysOption = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Change a machine's name, labels, policy or metadata; what is not named stays as it is."""
    said = options.policy(
        command="update",
        autostart=autostart,
        fallback=fallback,
        release=release,
        findings=on,
        snapshot_every=snapshot_every,
        snapshot_keep=snapshot_keep,
    )
    if no_snapshots:
        said["snapshot_every"] = None
    told_guest = options.metadata(
        command="update", hostname=hostname, user_data=user_data, ssh_keys=ssh_key
    )
    added = options.labels("--label", label, command="update")
    if not (said or told_guest or added or unlabel or rename):
        raise options.wrong("update", name, "what to change", command="update")
    machine = _machine(name)
    fields: dict[str, Any] = {"name": rename}
    if added or unlabel:
        # Not None, which says nothing: it may be that none is left.
        fields["labels"] = _without({**machine.labels, **added}, unlabel or [])
    if said:
        fields["policy"] = {**machine.policy.model_dump(), **said}
        if on:
            fields["policy"]["findings"] = {**machine.policy.findings, **said["findings"]}
    if told_guest:
        fields["metadata"] = {**machine.metadata.model_dump(), **told_guest}
    return change(
        [_update(machine.id, fields)],
        How(wait, dry_run, as_json),
        lambda operation: f"{rename or machine.name} is updated",
    )


def _without(labels: dict[str, str], keys: list[str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key not in keys}


def _update(machine: str, fields: dict[str, Any]) -> Any:
    from vmlab.machine.documents import build
    from vmlab.manager.requests import UpdateMachine

    given = {name: value for name, value in fields.items() if value is not None}
    return build(UpdateMachine, {"machine": machine, **given})


def _machine(name: str) -> MachineDocument:
    from vmlab.cli.manager.connecting import ask

    async def asking(client: AsyncClient) -> MachineDocument:
        return await client.machines.show(name)

    return ask(asking)
