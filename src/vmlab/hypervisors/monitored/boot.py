"""What a machine's kernel is told, and what has to be known before a machine is made."""

from __future__ import annotations

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.spec import MachineSpec


def refuse_image(spec: MachineSpec, hypervisor: str) -> None:
    """Refuse a machine that names an image where a kernel has to be named.

    Raises:
        InvalidSpec: it does.
    """
    if spec.boot.image is not None:
        expected = "the kernel and initrd that the image has"
        raise InvalidSpec(
            [SpecProblem("boot.image", spec.boot.image, expected)],
            machine=spec.name,
            hypervisor=hypervisor,
            hint="images are looked up before a machine is created: `vmlab run` does that",
        )


def console_argument(spec: MachineSpec) -> str:
    """The kernel's console: the first of the machine's, unless the command line names one."""
    if not spec.consoles or "console=" in spec.boot.cmdline:
        return ""
    virtio = spec.consoles[0].kind == "virtio"
    return f"console={'hvc0' if virtio else spec.architecture.console}"
