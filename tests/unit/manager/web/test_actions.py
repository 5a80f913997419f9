"""What a form on a machine's page means."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from vmlab.machine.errors import InvalidSpec
from vmlab.machine.states import MachineState
from vmlab.manager import requests as r
from vmlab.manager.documents import MachineDocument
from vmlab.manager.requests import MachinePolicy, Metadata
from vmlab.manager.web.forms import Form
from vmlab.manager.web.machines import _action, _new, actions_of

NOW = datetime(2026, 5, 4, tzinfo=UTC)
ID = "0" * 32


def machine(state: str = "running") -> MachineDocument:
    return MachineDocument(
        id=ID, name="web", state=MachineState(state), wanted="running", host="simulated",
        hypervisor="simulated", architecture="x86_64", vcpus=1, memory=1, spec={},
        policy=MachinePolicy(fallback=("qemu",)), metadata=Metadata(), version=1, created=NOW,
        updated=NOW,
    )  # fmt: skip


def meant(**fields: str) -> r.Request:
    return _action(machine(), Form({name: [value] for name, value in fields.items()}))


@pytest.mark.parametrize(
    "fields, request_",
    [
        ({"action": "start"}, r.StartMachine(machine=ID)),
        ({"action": "stop"}, r.StopMachine(machine=ID)),
        ({"action": "kill"}, r.StopMachine(machine=ID, graceful=False)),
        ({"action": "restart"}, r.RestartMachine(machine=ID)),
        ({"action": "pause"}, r.PauseMachine(machine=ID)),
        ({"action": "resume"}, r.ResumeMachine(machine=ID)),
        (
            {"action": "resize", "vcpus": "2", "memory": "1G"},
            r.ResizeMachine(machine=ID, vcpus=2, memory=1 << 30),
        ),
        ({"action": "resize", "vcpus": "3"}, r.ResizeMachine(machine=ID, vcpus=3)),
        (
            {"action": "clone", "name": "b", "snapshot": "s"},
            r.CloneMachine(machine=ID, name="b", snapshot="s"),
        ),
        ({"action": "clone", "name": "", "snapshot": ""}, r.CloneMachine(machine=ID)),
        ({"action": "migrate", "host": "other"}, r.MigrateMachine(machine=ID, host="other")),
        ({"action": "snapshot", "name": "s"}, r.SnapshotMachine(machine=ID, name="s")),
        ({"action": "restore", "snapshot": "s"}, r.RestoreMachine(machine=ID, snapshot="s")),
        ({"action": "forget", "snapshot": "s"}, r.DeleteSnapshot(machine=ID, name="s")),
        ({"action": "delete", "confirm": "web"}, r.DeleteMachine(machine=ID)),
        (
            {"action": "delete", "confirm": "web", "force": "yes"},
            r.DeleteMachine(machine=ID, force=True),
        ),
        (
            {"action": "update", "name": "b", "labels": "a=1", "autostart": "yes"},
            r.UpdateMachine(
                machine=ID,
                name="b",
                labels={"a": "1"},
                policy=MachinePolicy(fallback=("qemu",), autostart=True),
            ),
        ),
    ],
)
def test_a_button_means_a_request(fields: dict[str, str], request_: r.Request) -> None:
    assert meant(**fields) == request_


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "explode"},
        {},
        {"action": "delete", "confirm": "Web"},
        {"action": "snapshot", "name": ""},
        {"action": "resize", "vcpus": "0"},
    ],
)
def test_what_a_form_cannot_mean_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidSpec):
        meant(**fields)


@pytest.mark.parametrize(
    "state, buttons",
    [
        ("created", ["start"]),
        ("running", ["stop", "kill", "restart", "pause"]),
        ("paused", ["stop", "kill", "resume"]),
        ("failed", ["start", "kill"]),
        ("stopping", ["kill"]),
        ("deleting", []),
    ],
)
def test_a_machine_has_the_buttons_of_its_state(state: str, buttons: list[str]) -> None:
    assert actions_of(machine(state)) == buttons


def test_a_new_machine_is_what_the_form_says() -> None:
    filled = {
        "name": "web", "image": "tiny", "host": "qemu", "vcpus": "2", "memory": "1G",
        "network": "lan", "labels": "a=1", "autostart": "yes", "start": "yes",
        "ssh_keys": "one\n\ntwo\n", "user_data": "#cloud-config\n", "spec": '{"cpus": 1}',
    }  # fmt: skip
    wanted = _new(Form({name: [value] for name, value in filled.items()} | {"disks": ["d", "e"]}))
    assert wanted == r.CreateMachine(
        name="web",
        image="tiny",
        host="qemu",
        vcpus=2,
        memory=1 << 30,
        spec={"cpus": 1},
        disks=("d", "e"),
        nics=(r.NewNic(network="lan"),),
        labels={"a": "1"},
        policy=MachinePolicy(autostart=True),
        metadata=Metadata(ssh_keys=("one", "two"), user_data="#cloud-config\n"),
        start=True,
    )
    least = _new(Form({"network": ["none"]}))
    assert least == r.CreateMachine()
