"""A debugger's socket: what may be one, and what QEMU is told of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import SOCKET_PATH_LIMIT, Owner
from vmlab.hypervisors.qemu import provider
from vmlab.hypervisors.qemu.boards import BOARDS
from vmlab.hypervisors.qemu.command_line import Launch, arguments
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.spec import MachineSpec


@pytest.mark.parametrize("socket", ["gdb.sock", "/" + "x" * SOCKET_PATH_LIMIT])
def test_a_socket_that_gdb_could_not_name_is_refused(tmp_path: Path, socket: str) -> None:
    with pytest.raises(InvalidSpec, match="absolute path"):
        provider.open(Owner("run", "r", tmp_path), {"gdb": socket})


def test_the_socket_that_was_asked_for_is_the_machine_s(tmp_path: Path) -> None:
    opened = provider.open(Owner("run", "r", tmp_path), {"gdb": "/run/gdb.sock"})
    assert opened.debugger == Path("/run/gdb.sock")
    assert provider.open(Owner("run", "r", tmp_path)).debugger is None


def test_qemu_listens_for_a_debugger_only_where_one_is_wanted() -> None:
    def words(debugger: Path | None) -> list[str]:
        spec = MachineSpec.of(name="m", architecture="x86_64")
        board = BOARDS[spec.architecture]
        return arguments(
            Launch(
                id="0" * 32,
                spec=spec,
                accelerator="tcg",
                layout=Layout.of(spec, board),
                disks=(),
                netdevs=(),
                logs=Path("/logs"),
                program="qemu",
                debugger=debugger,
            )
        )

    assert "-gdb" not in words(None)
    options = dict(pairwise(words(Path("/run/a,b.sock"))))
    assert options["-gdb"] == "unix:/run/a,,b.sock,server=on,wait=off"
