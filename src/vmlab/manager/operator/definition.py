"""From a request for a machine to its specification, and to the hosts that can take it.

A template is a request whose blanks are filled in. What is asked of the store of images and of
hypervisors is asked before the transaction; the image itself is built or fetched when the operation
runs. The name at the hypervisor is made of the machine's id, so that no user's name gets there.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field
from sqlalchemy.orm import Session

from vmlab.hypervisors.threads import done_in_thread
from vmlab.images.progress import Progress, silent
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec, SpecProblem, VmlabError
from vmlab.machine.fit import check_fit
from vmlab.machine.spec import MachineSpec, Nic
from vmlab.manager.documents import TemplateDocument
from vmlab.manager.requests import CreateMachine, NewNic
from vmlab.manager.store.queries import find_template, template_document

if TYPE_CHECKING:
    from vmlab.lab.boot import Wish
    from vmlab.manager.manager import Manager

__all__ = ["PreparedMachine", "bootable", "json_of", "new_mac", "prepare", "spec_of"]

SIMULATED: Final = "simulated"
"""The hypervisor whose guests need no image: they are simulated, too."""


class PreparedMachine(CreateMachine):
    """A request for a machine with its blanks filled in."""

    hosts: tuple[str, ...] = Field((), description="hosts that can take it, the first one first")


def json_of(spec: MachineSpec) -> dict[str, Any]:
    """A specification as the store keeps it."""
    return spec.model_dump(mode="json", exclude_defaults=True)


def spec_of(data: dict[str, Any]) -> MachineSpec:
    """A specification as the store kept it.

    Raises:
        InvalidSpec: it is not valid any more.
    """
    return MachineSpec.of(**data)


def new_mac() -> str:
    """A MAC address at random: unicast, locally administered (IEEE 802, 8.4)."""
    return ":".join(["52", "54", *(f"{byte:02x}" for byte in secrets.token_bytes(4))])


async def prepare(manager: Manager, request: CreateMachine) -> PreparedMachine:
    """Fill in what a request leaves out, and find the hosts that can take the machine.

    Raises:
        InvalidSpec, UnsupportedOperation, ResourceExhausted: no host can take such a machine.
        HypervisorUnavailable: no host can be used that could take it.
        ResourceNotFound: there is no such template.
        ImageError: there is no such image.
    """
    fields: dict[str, Any] = {name: getattr(request, name) for name in CreateMachine.model_fields}
    fields["name"] = request.name or f"vm-{secrets.token_hex(3)}"
    if request.template is not None:
        template = await manager.database.read(_template, request.template)
        fields["image"] = request.image or (None if request.spec else template.image)
        fields["spec"] = request.spec or (None if request.image else template.spec)
        fields["vcpus"] = request.vcpus or template.vcpus
        fields["memory"] = request.memory or template.memory
        fields["labels"] = {**template.labels, **request.labels}
    spec, image = fields["spec"], fields["image"]
    if spec is None and image is None and request.template is None:
        raise InvalidSpec(
            [SpecProblem("image", None, "one of template, image and spec has to be given")],
            hint="`vmlab image list` shows the images that there are",
        )
    if spec is not None and image is not None:
        raise InvalidSpec([SpecProblem("image", image, "nothing beside spec, which has its boot")])
    fields["nics"] = request.nics
    made = await _specification(fields)
    fields["spec"] = json_of(made)
    fields["vcpus"], fields["memory"] = made.cpus.count, made.memory.size
    if not fields["nics"]:
        fields["nics"] = tuple(_nic_of(nic) for nic in made.nics)
    fields["hosts"] = await _hosts_for(manager, request, made, image)
    fields["host"] = fields["hosts"][0]
    return PreparedMachine.model_construct(**fields)


def _template(session: Session, name: str) -> TemplateDocument:
    return template_document(session, find_template(session, name))


async def _specification(fields: dict[str, Any]) -> MachineSpec:
    """The machine as far as it is known before its image is there."""
    given = fields["spec"]
    if given is None:
        architecture = None
        if fields["image"] is not None:
            architecture = await done_in_thread(_architecture, fields["image"])
        known = {} if architecture is None else {"architecture": architecture}
        boot = {} if fields["image"] is None else {"image": fields["image"]}
        return MachineSpec.of(
            name=fields["name"],
            cpus=fields["vcpus"] or 1,
            memory=fields["memory"] or "512M",
            boot=boot,
            nics=_nics(fields["nics"]),
            **known,
        )
    spec = MachineSpec.of(**{**given, "name": fields["name"]})
    if spec.boot.image is not None:
        problem = SpecProblem("spec.boot.image", spec.boot.image, "nothing: give it as `image`")
        raise InvalidSpec([problem])
    changes: dict[str, Any] = {}
    if fields["vcpus"]:
        changes["cpus"] = {**spec.cpus.model_dump(exclude_defaults=True), "count": fields["vcpus"]}
    if fields["memory"]:
        memory = spec.memory.model_dump(exclude_defaults=True)
        changes["memory"] = {**memory, "size": fields["memory"]}
    if fields["nics"]:
        changes["nics"] = _nics(fields["nics"])
    return spec.with_changes(**changes) if changes else spec


def _nics(nics: Sequence[NewNic]) -> tuple[Nic, ...]:
    """NICs as they can be told before their networks are there."""
    return tuple(
        Nic(
            name=nic.name or f"net{position}",
            network=nic.network if nic.network in {"user", "none"} else "none",
            mac=nic.mac,
        )
        for position, nic in enumerate(nics)
    )


def _nic_of(nic: Nic) -> NewNic:
    """A NIC of a specification as a request has it."""
    if nic.network not in {"user", "none"} or nic.forwards:
        raise InvalidSpec(
            [
                SpecProblem(
                    f"spec.nics.{nic.name}",
                    nic.network,
                    '"user" or "none" without forwards, or a NIC of the request\'s own on a '
                    "network of the manager's",
                )
            ]
        )
    return NewNic(network=nic.network, name=nic.name, mac=nic.mac)


def _architecture(image: str) -> Architecture:
    """The architecture of an image, which need not be here yet.

    Raises:
        ImageNotFound: nothing is called that.
    """
    from vmlab.images import ImageStore
    from vmlab.lab.preference import architecture_of

    found = architecture_of(image)
    # What the store says of a name that it does not know is its own business.
    return found if found is not None else ImageStore().ensure(image).architecture


# ------------------------------------------------------------------------ hosts


async def _hosts_for(
    manager: Manager, request: CreateMachine, spec: MachineSpec, image: str | None
) -> tuple[str, ...]:
    """The hosts that can take the machine, the preferred one first.

    Raises:
        VmlabError: none can; it is the first one's reason.
    """
    if request.host is not None:
        wanted = [request.host]
    else:
        wanted = _preferred(manager, spec, image)
    candidates = list(dict.fromkeys([*wanted, *request.policy.fallback]))
    for name in candidates:
        manager.hosts.setting(name)
    fitting: list[str] = []
    refusal: VmlabError | None = None
    for name in candidates:
        try:
            check_fit(spec, await manager.hosts.capabilities(name))
        except VmlabError as error:
            # Of hosts that were not asked for, one that is not there says the least.
            if refusal is None or isinstance(refusal, HypervisorUnavailable):
                refusal = refusal if request.host is not None and refusal is not None else error
        else:
            fitting.append(name)
    if not fitting:
        assert refusal is not None, "there is a candidate"
        raise refusal
    return tuple(fitting)


def _preferred(manager: Manager, spec: MachineSpec, image: str | None) -> list[str]:
    """The hosts that nobody had to name: those with real guests, the fitting one first."""
    names = list(manager.hosts.names)
    real = [name for name in names if manager.hosts.setting(name).hypervisor != SIMULATED]
    if not real:
        return names
    if image is None:
        return real
    from vmlab.lab.boot import Wish
    from vmlab.lab.preference import preference

    networked = any(nic.network == "user" for nic in spec.nics)
    chosen = preference(Wish(image=image, network=networked, name=spec.name), None).hypervisor
    return sorted(real, key=lambda name: manager.hosts.setting(name).hypervisor != chosen)


# ------------------------------------------------------------------------ images


def bootable(
    spec: MachineSpec, image: str, *, hostname: str, progress: Progress = silent
) -> MachineSpec:
    """The machine that boots an image, which is built or fetched now; blocks.

    Args:
        spec: The machine as far as it was known, with its NICs and disks.
        image: Name of the image.
        hostname: What the guest is called.
        progress: Told what is done, from this thread and others.

    Raises:
        ImageError: the image cannot be had.
    """
    from vmlab.images import ImageStore
    from vmlab.lab.boot import Wish, booted_by, find_image

    networked = any(nic.network != "none" for nic in spec.nics)
    wish: Wish = Wish(
        image=image,
        append="vmlab.net=dhcp" if networked else "",
        memory=str(spec.memory.size),
        cpus=spec.cpus.count,
        disks=spec.disks,
        nics=spec.nics,
        terminal=True,
        name=hostname,
    )
    found = booted_by(wish, find_image(wish, ImageStore(), progress=progress)).spec
    return found.with_changes(name=spec.name)
