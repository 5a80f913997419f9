"""Addresses and interfaces put right: released, taken off, removed, made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import Nic
from vmlab.manager.networks import links, names
from vmlab.manager.observer.repairs.repair import Facts, Repair, repair
from vmlab.manager.operator.handler import key
from vmlab.manager.operator.journal import Work
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import AddressRow, NetworkRow

__all__: list[str] = []


@repair
class TakeOffNic(Repair):
    """The NIC that has it wrongly is taken off its machine."""

    code = "address-conflict"
    action = "quarantine"
    text = "take the NIC that has the address wrongly off its machine"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        machines = [find_machine(session, each["machine"]) for each in _intruders(facts)]
        return frozenset(key("machine", row.id) for row in machines)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        taken = []
        for number, each in enumerate(_intruders(facts)):
            async with work.step(f"quarantine-{number}", f"take {each['nic']} off") as step:
                work.on_undo(step, lambda each=each, step=step: self._plug(each, step.data))  # type: ignore[misc]  # bound now, not when it is called
                if not step.done_before:
                    machine = await self.manager.machine(each["machine"])
                    nic = next((n for n in machine.spec.nics if n.name == each["nic"]), None)
                    if nic is None:
                        step.skip("the machine does not have it any more")
                    else:
                        step.data["nic"] = nic.model_dump(mode="json")
                        await machine.unplug_nic(nic.name)
            if "nic" in step.data:
                taken.append({"machine": each["machine"], "nic": step.data["nic"]})
        return {"taken": taken} if taken else None

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        for number, each in enumerate(before["taken"]):
            async with work.step(f"plug-{number}", "give the NIC back to its machine") as step:
                if not step.done_before:
                    await self._plug(each, each)

    async def _plug(self, each: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        if "nic" not in data:
            return
        nic = Nic.model_validate(data["nic"])
        machine = await self.manager.machine(each["machine"])
        if all(found.name != nic.name for found in machine.spec.nics):
            await machine.plug_nic(nic)


def _intruders(facts: Facts) -> list[dict[str, str]]:
    return list(facts.evidence["intruders"])


@repair
class ReleaseAddress(Repair):
    """The address is released."""

    code = "leaked-address"
    action = "reconcile"
    text = "release the address"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        machine = facts.evidence.get("machine")
        keys = {key("network", str(facts.evidence["network"]))}
        return frozenset(keys | ({key("machine", machine)} if machine is not None else set()))

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        columns = ("network", "address", "machine", "nic", "mac")
        async with work.step("reconcile", self.text) as step:
            if not step.done_before:
                step.also(_release, facts.subject, work.operation_id)
        return {column: facts.evidence.get(column) for column in columns}

    def check_undo(self, session: Session, facts: Facts, before: Mapping[str, Any]) -> None:
        if session.get(NetworkRow, before["network"]) is None:
            raise Conflict(
                "the network of that address is gone", hint="there is nothing to put back"
            )

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        async with work.step("take", "take the address again") as step:
            if not step.done_before:
                step.also(_take, dict(before), work.operation_id)


def _release(session: Session, address: str, operation: str) -> None:
    row = session.get(AddressRow, address)
    if row is not None:
        session.delete(row)
        _tell(session, "address.released", row, operation)


def _take(session: Session, before: dict[str, Any], operation: str) -> None:
    row = AddressRow(
        network_id=before["network"],
        address=before["address"],
        machine_id=before["machine"],
        nic_id=before["nic"],
        mac=before["mac"],
    )
    session.add(row)
    session.flush()
    _tell(session, "address.taken", row, operation)


def _tell(session: Session, kind: str, row: AddressRow, operation: str) -> None:
    network = session.get(NetworkRow, row.network_id)
    data = {"address": row.address, "machine": row.machine_id, "mac": row.mac}
    add_event(
        session,
        kind,
        subject=row.network_id,
        name=network.name if network is not None else None,
        operation=operation,
        data=data,
    )


@repair
class MendInterface(Repair):
    """What is lacking is made, what belongs to nothing is removed."""

    code = "lost-interface"
    action = "reconcile"
    text = "make what is lacking, remove what belongs to nothing"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        network = str(facts.evidence["network"])
        keys = {key("network", network), key("interface", facts.subject)}
        if facts.evidence["kind"] == "tap":
            keys.add(key("machine", find_machine(session, str(facts.evidence["machine"])).id))
        return frozenset(keys)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        network, name = str(facts.evidence["network"]), facts.subject
        async with work.step("reconcile", self.text) as step:
            if step.done_before:
                return None
            there = (await done_in_thread(links.links)).get(name)
            if facts.evidence["kind"] == "tap":
                await self._join(facts, there is not None)
                return None
            if there is None:
                if facts.evidence["lacking"]:
                    await self.manager.networks.ensure(network)
                else:
                    step.skip("it is gone already")
                return None
            if facts.evidence["lacking"]:
                step.skip("it is there again")
                return None
            if names.of_alias(self.manager.networks.host.home, there.alias) != network:
                raise OperationFailed(
                    f"the interface {name} is another one by now", operation="finding.repair"
                )
            await done_in_thread(links.remove, name)
        return None

    async def _join(self, facts: Facts, there: bool) -> None:
        """Put a machine's tap on its bridge; plug the NIC anew if it has none any more."""
        if there:
            await done_in_thread(links.join, facts.subject, str(facts.evidence["bridge"]))
            return
        machine = await self.manager.machine(str(facts.evidence["machine"]))
        nic = next((n for n in machine.spec.nics if n.name == facts.evidence["nic"]), None)
        if nic is not None:
            await machine.unplug_nic(nic.name)
            await machine.plug_nic(nic)
