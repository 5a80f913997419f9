from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest

from vmlab.cli import hypervisors as command
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Hypervisor, HypervisorProvider, Machine, Probe, ProbeItem
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import OperationFailed

GOOD = Capabilities(
    hypervisor="good",
    version="1.2",
    supported=frozenset({Capability.PAUSE, Capability.FORK}),
    unsupported={Capability.SHARE_VIRTIOFS: "virtiofsd is not installed"},
    architectures=frozenset({Architecture.X86_64, Architecture.RISCV64}),
    accelerators=("kvm", "tcg"),
)


class Played(Hypervisor):
    name = "good"

    def __init__(self, owner: Owner, answer: Callable[[], Capabilities]) -> None:
        self._owner = owner
        self.answer = answer
        self.closed = False

    @property
    def owner(self) -> Owner:
        return self._owner

    async def probe(self) -> Probe:
        raise NotImplementedError

    async def capabilities(self) -> Capabilities:
        assert self._owner.directory.is_dir()
        await asyncio.sleep(0)
        return self.answer()

    async def create(self, *_: Any, **__: Any) -> Machine:
        raise NotImplementedError

    async def create_from(self, *_: Any, **__: Any) -> Machine:
        raise NotImplementedError

    async def get(self, name: str) -> Machine:
        raise NotImplementedError

    async def list(self) -> Sequence[Machine]:
        raise NotImplementedError

    async def events(self, since: int = 0) -> Any:
        raise NotImplementedError

    def subscribe(self, since: int | None = None) -> AsyncIterator[Any]:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True


class PlayedProvider(HypervisorProvider):
    name = "good"
    summary = "a good one"

    def __init__(self, answer: Callable[[], Capabilities] = lambda: GOOD) -> None:
        self.answer = answer
        self.opened: list[Played] = []

    def probe(self) -> Probe:
        return Probe(
            hypervisor="good",
            available=True,
            version="1.2",
            items=(
                ProbeItem(name="tcg", works=True),
                ProbeItem(name="kvm", works=False, detail="there is no /dev/kvm", hint="modprobe"),
                ProbeItem(name="passt", works=False, detail="not installed"),
            ),
        )

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> Hypervisor:
        self.opened.append(Played(owner, self.answer))
        return self.opened[-1]


BROKEN = Probe(hypervisor="broken", available=False, reason="cannot be imported", hint="reinstall")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(provider: PlayedProvider | None, *others: Probe) -> None:
        probes = [provider.probe()] if provider else []
        monkeypatch.setattr(registry, "probe_all", lambda only: [*others, *probes])
        monkeypatch.setattr(registry, "provider", lambda name: provider)

    return install


def test_each_is_listed_with_what_it_can_do(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    provider = PlayedProvider()
    install(provider, BROKEN)
    assert main(["hypervisors"]) == ExitCode.OK
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "hypervisor works version guests accelerators remark"
    assert "broken no - - cannot be imported: reinstall" in lines
    assert "good yes 1.2 riscv64, x86_64 kvm, tcg a good one" in lines
    assert "capability good" in lines
    assert "pause yes" in lines
    assert "resume no" in lines
    assert "good: no share-virtiofs: virtiofsd is not installed" in lines
    assert "good: kvm: there is no /dev/kvm (modprobe)" in lines
    assert "good: passt: not installed" in lines
    assert not any(line.startswith("good: tcg") for line in lines)


def test_what_is_opened_for_the_question_is_closed_and_leaves_nothing(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    provider = PlayedProvider()
    install(provider)
    assert main(["hypervisors"]) == ExitCode.OK
    [opened] = provider.opened
    assert opened.closed
    assert opened.owner.kind == "run"
    assert not opened.owner.directory.parents[1].exists()
    assert capsys.readouterr().err == ""


def test_json_has_everything(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(PlayedProvider(), BROKEN)
    assert main(["hypervisors", "--json"]) == ExitCode.OK
    broken, good = json.loads(capsys.readouterr().out)
    assert broken["available"] is False
    assert broken["capabilities"] is None
    assert broken["hint"] == "reinstall"
    assert sorted(good["capabilities"]["supported"]) == ["fork", "pause"]
    assert good["architectures"] == ["riscv64", "x86_64"]
    assert good["items"][1]["detail"] == "there is no /dev/kvm"
    assert good["summary"] == "a good one"


def test_one_that_does_not_tell_what_it_can_do_harms_no_other(
    install: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Capabilities:
        raise OperationFailed("the daemon went away")

    install(PlayedProvider(fail))
    assert main(["hypervisors"]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert "it does not tell what it can do: OperationFailed: the daemon went away" in printed
    assert "capability" not in printed.splitlines()[3:]

    class Slow(Played):
        async def capabilities(self) -> Capabilities:
            await asyncio.sleep(60)
            return GOOD

    provider = PlayedProvider()
    monkeypatch.setattr(provider, "open", lambda owner: Slow(owner, lambda: GOOD))
    monkeypatch.setattr(command, "_SECONDS", 0.05)
    install(provider)
    assert main(["hypervisors"]) == ExitCode.OK
    assert "TimeoutError" in capsys.readouterr().out


def test_a_table_without_remarks(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    provider = PlayedProvider(lambda: GOOD.model_copy(update={"unsupported": {}}))
    provider.probe = lambda: Probe(hypervisor="good", available=True)  # a host in order
    install(provider)
    assert main(["hypervisors"]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "faults"


def test_none_at_all(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install(None)
    assert main(["hypervisors"]) == ExitCode.OK
    assert capsys.readouterr().out == "no hypervisor is installed\n"
    assert main(["hypervisors", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == []


def test_a_name_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hypervisors", "simulatd"]) == ExitCode.UNAVAILABLE
    assert "did you mean 'simulated'?" in capsys.readouterr().err


def test_the_simulated_one_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hypervisors", "simulated", "--json"]) == ExitCode.OK
    [row] = json.loads(capsys.readouterr().out)
    assert row["available"], row["reason"]
    assert "pause" in row["capabilities"]["supported"]
