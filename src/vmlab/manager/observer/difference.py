"""A difference between the store and the world, and what each code of one means.

`CODES` is the one list of codes: what they are called never changes, programs and policies know
them by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vmlab.manager.documents import Severity
from vmlab.manager.requests import FindingCode, Policy

__all__ = ["CODES", "Code", "Difference"]


@dataclass(frozen=True, slots=True)
class Code:
    """What a finding of one kind is.

    Attributes:
        name: The code.
        meaning: What is wrong, in a sentence.
        actions: What can be done about it, by its policy's name, and what that does.
        destroys: Which of those remove data: they need the name of it, typed by a person.
    """

    name: FindingCode
    meaning: str
    actions: Mapping[Policy, str] = field(default_factory=dict)
    destroys: frozenset[Policy] = frozenset()


_LIST: Final = (
    Code(
        "machine-state-mismatch",
        "a machine does something else than the store says",
        {
            "adopt": "the store takes over what the machine does",
            "reconcile": "the machine is brought to what it was last told to be",
        },
    ),
    Code(
        "orphan-process",
        "a process of the manager's belongs to no machine or network",
        {"reconcile": "the process is ended", "quarantine": "the process is stopped (SIGSTOP)"},
    ),
    Code(
        "orphan-machine",
        "a hypervisor has a machine of the manager's that the store does not know",
        {
            "adopt": "the store takes the machine in",
            "quarantine": "the machine is paused",
            "reconcile": "the machine is deleted with its disks",
        },
        frozenset({"reconcile"}),
    ),
    Code(
        "missing-disk",
        "the file of a disk is not there, or is no disk",
        {"adopt": "the disk is marked as failed"},
    ),
    Code(
        "orphan-disk",
        "a file among the disks belongs to no disk of the store",
        {
            "adopt": "the store takes it in as a disk",
            "quarantine": "the file is moved aside",
            "reconcile": "the file is removed",
        },
        frozenset({"reconcile"}),
    ),
    Code(
        "disk-attachment-mismatch",
        "a machine has a disk that the store says it has not, or the other way round",
        {
            "adopt": "the store takes over what the machine has",
            "reconcile": "the disk is attached or detached as the store says",
        },
    ),
    Code(
        "disk-size-mismatch",
        "a disk has another size than the store says",
        {
            "adopt": "the store takes over the size",
            "reconcile": "the disk is grown to the size that the store says",
        },
    ),
    Code(
        "address-conflict",
        "two have one address, or one has an address that is another's",
        {"quarantine": "the NIC that has it wrongly is taken off its machine"},
    ),
    Code(
        "leaked-address",
        "an address is taken by nobody",
        {"reconcile": "the address is released"},
    ),
    Code(
        "lost-interface",
        "an interface of the host belongs to no network, or a network lacks one",
        {"reconcile": "what is lacking is made, what belongs to nothing is removed"},
    ),
    Code(
        "stale-lock",
        "something is locked or set aside for somebody who is gone",
        {"reconcile": "what nobody waits for is let go"},
    ),
    Code(
        "guest-agent-unreachable",
        "a guest that should answer does not",
        {"reconcile": "the machine is restarted"},
    ),
    Code(
        "clock-drift",
        "a guest's clock is wrong",
        {"reconcile": "the guest's clock is set"},
    ),
    Code("storage-low", "a file system that the manager needs is nearly full"),
)

CODES: Final[Mapping[str, Code]] = {code.name: code for code in _LIST}
"""All codes, by name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference, as a check found it.

    Attributes:
        code: Which.
        subject: What it is about: the id of a machine, disk or network, or what names it as well;
            together with the code it says which finding this is.
        name: What a person calls that.
        message: What is wrong, as one sentence.
        source: What of the world was looked at for it (see `Seen.looked`): as long as that is not
            looked at again, nobody can say that it is over.
        touches: Ids of the store's: while an operation is under way on one of them, this is none.
        actions: The policies that can be followed here.
    """

    code: FindingCode
    severity: Severity
    subject: str
    name: str | None
    message: str
    source: str
    hint: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    touches: frozenset[str] = frozenset()
    actions: tuple[Policy, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Which finding this is."""
        return self.code, self.subject
