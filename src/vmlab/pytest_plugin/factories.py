"""What the fixtures hand out: machines, disks and networks of a test's, a module's or a session's.

Machines are the lab's (`vmlab.lab.laboratory`); here they get what the test's mark and the options
say, somebody who watches them, the faults of the mark, and an end with their scope.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmlab.lab.armed import Armed
from vmlab.lab.laboratory import Lab
from vmlab.pytest_plugin.marks import VmMark, mark_of
from vmlab.pytest_plugin.saying import progress_of, say

if TYPE_CHECKING:
    from vmlab.lab.networks import LabNetwork
    from vmlab.lab.vm import VM, LabDisk
    from vmlab.machine.spec import Disk, Nic, Share
    from vmlab.pytest_plugin.machine_run import MachineRun


def open_lab(run: MachineRun, *, shared: Path | None) -> Lab:
    """A laboratory as the options want it.

    Args:
        run: Whose tests it is for.
        shared: What those of other processes have as well.
    """
    owner = None
    if run.settings.keep is not None:
        from vmlab.hypervisors.ownership import Store

        # What is to outlive this process must not belong to it, not even until then.
        owner = Store.open().owner
    terminal = run.settings.sit or run.settings.keep is not None
    progress = progress_of(run.config, run.worker)
    lab = Lab(seed=run.seed, owner=owner, shared=shared, terminal=terminal, progress=progress)
    lab.observers.append(run.supervision)
    lab.tell = partial(say, run.config, run.worker)
    return lab


class VmFactory:
    """Makes machines that live as long as a fixture does.

    What a call leaves out is as the mark says, then as the options do.

    Attributes:
        name: The fixture's.
        machines: Those that it has made, in order.
    """

    def __init__(self, run: MachineRun, request: pytest.FixtureRequest, hypervisor: str) -> None:
        self.name = str(request.fixturename)
        self.machines: list[VM] = []
        self.hypervisor = hypervisor
        self._run = run
        self._request = request
        single = request.scope == "function"
        self._mark = run.mark_of(request.node) if single else mark_of(request.node)
        self._scope = self._mark.scope or run.settings.scope
        self._seed = run.seed_of(request.node)
        self._armed: list[Armed] = []

    def __call__(
        self,
        *,
        name: str | None = None,
        image: str | None = None,
        memory: int | str | None = None,
        cpus: int | None = None,
        disks: Sequence[LabDisk | Disk | str] = (),
        nics: Sequence[Nic] = (),
        networks: Sequence[LabNetwork | str] = (),
        shares: Sequence[Share | str] | None = None,
        boot: bool = True,
        template: bool | None = None,
        timeout: float | None = None,
    ) -> VM:
        """A machine that nobody has used yet.

        Args:
            name: Its name and hostname; made up if None.
            image: What it boots.
            memory: Bytes, or a size such as "1G".
            cpus: Number of vCPUs.
            disks: Disks beside that of the image: of `disk_factory`, or sizes.
            nics: Network interfaces.
            networks: Networks of `network_factory`, or names of networks.
            shares: Directories of this host inside the guest: ".:/src", ".:/src:rw".
            boot: Boot it, and wait until its guest answers.
            template: Fork it from a booted template where the hypervisor can; None is as the
                scope says.
            timeout: Seconds that it has to boot and answer.

        Raises:
            VmlabError: it cannot be made, or does not boot.
        """
        made = self._lab.vm(
            **self._wishes(image, memory, cpus, shares),
            name=name or self._own_name(),
            disks=disks,
            nics=nics,
            networks=networks,
            hypervisor=self.hypervisor,
            boot=boot,
            template=self._templates if template is None else template,
            timeout=timeout,
        )
        return self._made(made)

    def first(self, *, boot: bool = True) -> VM:
        """The test's machine, with the faults of its mark."""
        vm = self(boot=boot)
        self._arm([vm])
        return vm

    def several(self, which: int | str, *more: str, **given: Any) -> list[VM]:
        """Machines on a private network of their own, which find each other by name.

        Args:
            which: How many, or the name of the first one.
            more: The names of the others.
            given: As for a single one (`memory`, `disks`, `boot`, ...).
        """
        wishes = self._wishes(
            given.pop("image", None),
            given.pop("memory", None),
            given.pop("cpus", None),
            given.pop("shares", None),
        )
        numbered = isinstance(which, int) and self._run.settings.keep is None
        made = self._lab.vms(
            which if numbered else self._names(which, more),
            hypervisor=self.hypervisor,
            **{"template": self._templates, **wishes, **given},
        )
        machines = [self._made(vm) for vm in made]
        self._arm(machines)
        return machines

    def disk(
        self, size: int | str | None = None, *, name: str | None = None, source: Path | None = None
    ) -> LabDisk:
        """A disk to be given to machines; each has its own copy of what it starts from.

        Args:
            size: Bytes, or a size such as "1G"; that of `source` if None.
            name: Its name in the machine; by its position if None.
            source: What is on it in the beginning: a file of this host's.
        """
        return self._lab.disk(size, name=name, source=source)

    def network(self, name: str | None = None) -> LabNetwork:
        """A private network for machines: `vm_factory(networks=[...])`."""
        return self._lab.network(name)

    def _own_name(self) -> str | None:
        """A name for a machine that has none; None leaves it to the lab.

        One that may stay needs a name that no other run's has.
        """
        return f"vm-{secrets.token_hex(3)}" if self._run.settings.keep is not None else None

    def _names(self, which: int | str, more: Sequence[str]) -> list[str]:
        if isinstance(which, int):
            return [f"vm-{secrets.token_hex(3)}" for _ in range(which)]
        return [which, *more]

    @property
    def _templates(self) -> bool:
        # A machine that stays must not depend on one that goes with the run.
        return self._scope != "function" and self._run.settings.keep is None

    @property
    def _lab(self) -> Lab:
        """Where its machines are made: templates belong to a lab, and live as long."""
        if self._scope == "module" and self._request.scope != "session":
            lab: Lab = self._request.getfixturevalue("vm_module_lab")
            return lab
        return self._run.lab

    def _wishes(
        self,
        image: str | None,
        memory: int | str | None,
        cpus: int | None,
        shares: Sequence[Share | str] | None,
    ) -> dict[str, Any]:
        """What the test wants, its mark, and the options, in this order."""
        mark: VmMark = self._mark
        return {
            "image": image or mark.image or self._run.settings.image,
            "memory": memory if memory is not None else mark.memory,
            "cpus": cpus if cpus is not None else mark.cpus,
            "shares": mark.shares if shares is None else tuple(shares),
        }

    def _made(self, vm: VM) -> VM:
        self.machines.append(vm)
        return vm

    def _arm(self, machines: Sequence[VM]) -> None:
        """Break what the mark says is broken, in each machine or in the one that a fault names."""
        schedule = self._mark.fault
        if schedule is None or not schedule.faults:
            return
        if not self._mark.seeded:
            schedule = schedule.model_copy(update={"seed": self._seed})
        self._armed.append(Armed(machines, schedule))

    def close(self) -> None:
        """The machines go, unless they are to be kept."""
        armed, self._armed = self._armed, []
        for faults in armed:
            faults.disarm()
        machines, self.machines = self.machines[::-1], []
        for vm in machines:
            if self._kept():
                self._run.keep(vm)
            else:
                vm.delete()

    def _kept(self) -> bool:
        keep = self._run.settings.keep
        trial = self._run.current
        return keep == "always" or (keep == "failed" and trial is not None and trial.failed)
