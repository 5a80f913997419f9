"""The board's memory map and device tree against QEMU's "virt" machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.engine.board.tree import Tree, parse

from vmlab.engine.board import MAX_SLOTS, VIRTIO_BASE, Board, Chosen
from vmlab.engine.devices.bus import BusFault
from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.memory.ram import Ram
from vmlab.machine.errors import VmlabError

MIB = 1 << 20
# What QEMU's board has and this one has not.
ABSENT = ("/pmu", "/fw-cfg@", "/flash@", "/platform-bus@", "/soc/pci@")
# What is said here in other words, or to other kernels: QEMU 7.2 knows no isa-extensions.
OWN = {
    "phandle", "riscv,isa", "riscv,isa-base", "riscv,isa-extensions", "model", "rng-seed",
    "riscv,cbom-block-size", "riscv,cbop-block-size", "riscv,cboz-block-size", "bootargs",
}  # fmt: skip


def board(harts: int = 2, memory: int = 256 * MIB, **options: object) -> Board:
    return Board(
        Ram(memory),
        harts,
        ManualClock(),
        lambda hart, bit, level: None,
        lambda kind, code: None,
        **options,
    )


def qemu_tree(folder: Path, machine: str, harts: int) -> Tree:
    if shutil.which("qemu-system-riscv64") is None:
        pytest.skip("needs Debian's qemu-system-misc")
    file = folder / "virt.dtb"
    subprocess.run(
        ["qemu-system-riscv64", "-M", f"{machine},dumpdtb={file}", "-smp", str(harts),
         "-m", "256M", "-display", "none"],
        check=True, capture_output=True, timeout=250,
    )  # fmt: skip
    return parse(file.read_bytes())


def handles(tree: Tree) -> dict[int, str]:
    return {
        node.cells("phandle")[0]: path
        for path, node in tree.paths().items()
        if "phandle" in node.properties
    }


def meaning(tree: Tree, path: str, name: str) -> object:
    """A property's value, with phandles replaced by the paths that they stand for."""
    node = tree.at(path)
    names = handles(tree)
    if name in {"interrupt-parent", "regmap", "cpu"}:
        return names[node.cells(name)[0]]
    if name == "interrupts-extended":
        cells = node.cells(name)
        return [(names[cells[n]], cells[n + 1]) for n in range(0, len(cells), 2)]
    return node.properties[name]


@pytest.mark.parametrize("harts", [1, 3])
@pytest.mark.parametrize("machine", ["virt", "virt,aclint=on"])
def test_the_device_tree_says_what_qemus_says(tmp_path: Path, machine: str, harts: int) -> None:
    theirs = qemu_tree(tmp_path, machine, harts)
    ours = parse(board(harts, separate_aclint="aclint" in machine).device_tree(Chosen()))
    expected = {p for p in theirs.paths() if not p.startswith(ABSENT)}
    assert set(ours.paths()) == expected
    for path in expected:
        theirs_here = set(theirs.at(path).properties) - OWN
        assert set(ours.at(path).properties) - OWN == theirs_here, path
        for name in theirs_here:
            assert meaning(ours, path, name) == meaning(theirs, path, name), f"{path}: {name}"


def test_dtc_has_nothing_to_say_about_the_device_tree() -> None:
    if shutil.which("dtc") is None:
        pytest.skip("needs Debian's device-tree-compiler")
    tree = board(4, slots=12).device_tree(
        Chosen("console=ttyS0 root=/dev/vda", (0x8400_0000, 0x8500_0000), bytes(32))
    )
    result = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dts", "-"],
        input=tree,
        capture_output=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    text = result.stdout.decode()
    assert 'bootargs = "console=ttyS0 root=/dev/vda";' in text
    assert "linux,initrd-start = <0x00 0x84000000>;" in text
    # QEMU's board draws the same remarks; nothing else may be remarked.
    known = ("simple_bus_reg", "unit_address_vs_reg", "interrupts_extended", "unique_unit_address",
             "avoid_default_addr_size", "interrupt_provider", "graph_child_address")  # fmt: skip
    remarks = [
        line for line in result.stderr.decode().splitlines()
        if "Warning" in line and not any(word in line for word in known)
    ]  # fmt: skip
    assert remarks == []


def test_the_isa_is_said_in_both_ways() -> None:
    cpu = parse(board(1).device_tree(Chosen())).at("/cpus/cpu@0")
    old = cpu.texts("riscv,isa")[0]
    assert old.startswith("rv64imafdc_")
    assert set(old.removeprefix("rv64imafdc_").split("_")) | set("imafdc") == set(
        cpu.texts("riscv,isa-extensions")
    )


def test_every_device_answers_at_its_address_and_nothing_beside_it() -> None:
    machine = board(2)
    for window in machine.bus.windows():
        size = 4 if 4 in window.sizes else 1
        machine.bus.read(window.base, size)
        last = window.end - size
        machine.bus.read(last, size)
        assert machine.bus.windows() == tuple(sorted(machine.bus.windows(), key=lambda w: w.base))
    for address in (0, 0x9_FFFC, 0x10_2000, 0x1000_0100, 0x1000_9000, 0x8000_0000, 1 << 60):
        with pytest.raises(BusFault):
            machine.bus.read(address, 4)


def test_more_slots_have_addresses_and_interrupts_of_their_own() -> None:
    tree = parse(board(1, slots=MAX_SLOTS).device_tree(Chosen()))
    nodes = {
        path: node for path, node in tree.paths().items() if path.startswith("/soc/virtio_mmio@")
    }
    sources = [node.cells("interrupts")[0] for node in nodes.values()]
    assert len(nodes) == MAX_SLOTS
    assert len(set(sources)) == MAX_SLOTS
    assert not set(sources) & {10, 11} and max(sources) < 32
    assert f"/soc/virtio_mmio@{VIRTIO_BASE + 0x1000 * 27:x}" in nodes


@pytest.mark.parametrize(("harts", "slots"), [(0, 8), (513, 8), (1, 7), (1, 29)])
def test_a_board_that_cannot_be_made_is_refused(harts: int, slots: int) -> None:
    with pytest.raises(VmlabError) as caught:
        board(harts, slots=slots)
    assert caught.value.hint
