"""What is done about a finding: the machine's own policy, the manager's, or nothing but telling.

A policy never does more than what removes no data: that needs a name typed by a person.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from vmlab.manager.observer.difference import CODES
from vmlab.manager.observer.known import Known
from vmlab.manager.requests import Policy

__all__ = ["policy_for", "read_policies", "repair_for"]

_POLICIES: Final[Mapping[str, Policy]] = {
    "report": "report",
    "adopt": "adopt",
    "reconcile": "reconcile",
    "quarantine": "quarantine",
}


def read_policies(value: object) -> dict[str, Policy]:
    """The policies in a text such as "machine-state-mismatch=reconcile,orphan-disk=quarantine".

    Args:
        value: Such a text, or the policies by code.

    Raises:
        ValueError: a code or a policy that is none, or one that this code cannot have.
    """
    if isinstance(value, str):
        pieces = [piece.strip() for piece in value.split(",") if piece.strip()]
        halves = [piece.partition("=") for piece in pieces]
        pairs = [(code.strip(), name.strip()) for code, _, name in halves]
    elif isinstance(value, Mapping):
        pairs = [(str(code), str(name)) for code, name in value.items()]
    else:
        raise ValueError('"CODE=POLICY,CODE=POLICY"')
    found: dict[str, Policy] = {}
    for code, name in pairs:
        known, policy = CODES.get(code), _POLICIES.get(name)
        if known is None:
            raise ValueError(f"a code before each '=', and {code!r} is none of {', '.join(CODES)}")
        if policy is None or (policy != "report" and policy not in known.actions):
            possible = ", ".join(["report", *known.actions])
            raise ValueError(f"for {code} one of {possible}, not {name!r}")
        found[code] = policy
    return found


def policy_for(
    code: str, touches: Collection[str], known: Known, everywhere: Mapping[str, Policy]
) -> Policy:
    """The policy for a finding: that of a machine it touches, or the one for all.

    Where it touches several machines that want different things, it is only reported.
    """
    own = {
        _POLICIES[machine.policies[code]]
        for id_ in touches
        if (machine := known.machine.get(id_)) is not None and code in machine.policies
    }
    if len(own) > 1:
        return "report"
    return own.pop() if own else everywhere.get(code, "report")


def repair_for(code: str, policy: str, actions: Collection[str]) -> Policy | None:
    """What a policy does by itself about a finding with those actions; None is nothing."""
    if policy == "report" or policy not in actions:
        return None
    if policy in CODES[code].destroys:
        return None
    return _POLICIES[policy]
