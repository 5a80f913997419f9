from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Hypervisor, HypervisorProvider, Probe
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.errors import HypervisorUnavailable


class Provider(HypervisorProvider):
    name = "good"
    summary = "a good one"

    def __init__(self, answer: Callable[[], Probe]) -> None:
        self.answer = answer

    def probe(self) -> Probe:
        return self.answer()

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> Hypervisor:
        raise NotImplementedError


class Registered:
    """The entry points that there are in a test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entries: list[EntryPoint] = []
        self.module = ModuleType("vmlab_test_hypervisors")
        patch.setitem(__import__("sys").modules, self.module.__name__, self.module)
        patch.setattr(registry, "entry_points", lambda group: list(self.entries))

    def add(self, name: str, thing: object, *, attribute: str = "", package: str = "") -> None:
        attribute = attribute or name
        setattr(self.module, attribute, thing)
        entry = EntryPoint(name, f"{self.module.__name__}:{attribute}", registry.GROUP)
        if package:
            vars(entry)["dist"] = SimpleNamespace(name=package)
        self.entries.append(entry)

    def add_broken(self, name: str, value: str) -> None:
        self.entries.append(EntryPoint(name, value, registry.GROUP))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registered]:
    yield Registered(monkeypatch)


def works(name: str) -> Provider:
    return Provider(lambda: Probe(hypervisor=name, available=True, version="1"))


def test_the_simulated_hypervisor_is_registered() -> None:
    assert "simulated" in registry.names()


def test_names_are_sorted_and_nothing_is_imported(registered: Registered) -> None:
    registered.add_broken("zebra", "no.such.module:x")
    registered.add("ant", works("ant"))
    assert registry.names() == ["ant", "zebra"]


def test_a_provider_is_found_by_name(registered: Registered) -> None:
    thing = works("good")
    registered.add("good", thing)
    assert registry.provider("good") is thing


def test_an_unknown_name_suggests_the_one_that_was_meant(registered: Registered) -> None:
    registered.add("simulated", works("simulated"))
    registered.add("qemu", works("qemu"))
    with pytest.raises(HypervisorUnavailable) as caught:
        registry.provider("simulatd")
    assert caught.value.message == ("there is no hypervisor 'simulatd'; did you mean 'simulated'?")
    assert caught.value.hint is not None
    assert "there are qemu, simulated" in caught.value.hint
    with pytest.raises(HypervisorUnavailable) as caught:
        registry.provider("zzz")
    assert "did you mean" not in caught.value.message


def test_nothing_registered_is_a_broken_installation(registered: Registered) -> None:
    assert registry.names() == []
    assert registry.probe_all() == []
    with pytest.raises(HypervisorUnavailable) as caught:
        registry.provider("qemu")
    assert caught.value.hint is not None
    assert "install it again" in caught.value.hint


def test_one_that_cannot_be_imported_says_why_and_harms_no_other(registered: Registered) -> None:
    registered.add_broken("missing", "no.such.module:provider")
    registered.add_broken("empty", "vmlab.hypervisors.registry:no_such_thing")
    registered.add("good", works("good"))
    with pytest.raises(HypervisorUnavailable, match="ModuleNotFoundError: No module named 'no'"):
        registry.provider("missing")
    probes = {probe.hypervisor: probe for probe in registry.probe_all()}
    assert list(probes) == ["empty", "good", "missing"]
    assert probes["good"].available
    assert not probes["missing"].available
    assert "No module named 'no'" in probes["missing"].reason
    assert probes["missing"].hint == "install its package again, with what it needs"
    assert "no_such_thing" in probes["empty"].reason


def test_what_is_no_provider_is_refused(registered: Registered) -> None:
    registered.add("class", Provider, package="vmlab-odd")
    with pytest.raises(HypervisorUnavailable, match="no HypervisorProvider") as caught:
        registry.provider("class")
    assert caught.value.hint is not None
    assert "a mistake in vmlab-odd" in caught.value.hint


def test_the_same_package_twice_on_the_path_is_no_conflict(registered: Registered) -> None:
    thing = works("good")
    registered.add("good", thing)
    registered.add("good", thing)
    assert registry.provider("good") is thing


def test_two_packages_with_one_name_are_a_conflict(registered: Registered) -> None:
    registered.add("good", works("good"), attribute="one", package="vmlab")
    registered.add("good", works("good"), attribute="two")
    with pytest.raises(HypervisorUnavailable) as caught:
        registry.provider("good")
    assert caught.value.message == (
        "hypervisor 'good' is registered as vmlab_test_hypervisors:one (vmlab)"
        " and vmlab_test_hypervisors:two (unknown package)"
    )
    [probe] = registry.probe_all()
    assert probe.hint == "uninstall one of the packages"


def test_probes_run_at_once_and_failing_ones_say_so(registered: Registered) -> None:
    together = threading.Barrier(2, timeout=60)

    def answer() -> Probe:
        together.wait()
        return Probe(hypervisor="x", available=True)

    def fail() -> Probe:
        raise RuntimeError("out of luck")

    registered.add("one", Provider(answer))
    registered.add("two", Provider(answer))
    registered.add("unlucky", Provider(fail))
    probes = {probe.hypervisor: probe for probe in registry.probe_all() if not probe.available}
    assert list(probes) == ["unlucky"]
    assert probes["unlucky"].reason == "its probe failed: RuntimeError: out of luck"


def test_a_probe_that_hangs_is_not_waited_for(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It begins, waits for the one that answers, and has used up its time.
    moments = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    end, ended = threading.Event(), list[bool]()

    def hang() -> Probe:
        end.wait(600)
        ended.append(True)
        return Probe(hypervisor="slow", available=True)

    registered.add("slow", Provider(hang))
    registered.add("good", works("good"))
    good, slow = registry.probe_all(timeout=99)
    assert not ended, "it was waited for"
    assert good.available
    assert slow == Probe(
        hypervisor="slow", available=False, reason="its probe did not answer within 99 s"
    )
    end.set()


def test_only_those_that_are_asked_for(registered: Registered) -> None:
    registered.add("good", works("good"))
    registered.add("other", works("other"))
    assert [probe.hypervisor for probe in registry.probe_all(only=["other"])] == ["other"]
    with pytest.raises(HypervisorUnavailable, match="did you mean 'other'"):
        registry.probe_all(only=["othr"])
