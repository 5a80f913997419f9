"""Profiles and options: what they say, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated import provider
from vmlab.hypervisors.simulated.client import RemoteSimulatedHypervisor
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.options import read_options
from vmlab.hypervisors.simulated.profile import (
    BUILT_IN,
    LATENCY_OF,
    NEVER,
    Latencies,
    SimulationProfile,
)
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.sizes import GIB

OWNER = Owner("run", "r", Path("/nonexistent"))


def test_standard_has_the_documented_latencies_and_limits():
    latency = SimulationProfile.load("standard").latency
    assert (latency.create, latency.start, latency.stop, latency.status) == (0.1, 2, 1, 0.01)
    assert (latency.network, latency.disk, latency.migration) == (0.005, 0.05, 0.01)
    assert latency.variability == 0.2
    limits = SimulationProfile.load("standard").limits
    assert (limits.machines, limits.vcpus_per_machine) == (100, 16)
    assert limits.memory_per_machine == 32 * GIB


def test_performance_and_unreliable_are_what_they_are_called():
    performance = SimulationProfile.load("performance")
    latency = performance.latency
    assert (latency.create, latency.start, latency.stop) == (0.05, 0.5, 0.2)
    assert performance.limits.machines == 1000
    unreliable = SimulationProfile.load("unreliable")
    assert unreliable.luck.failures["create"] == 0.1
    assert unreliable.latency.variability == 0.5
    assert {Capability.SNAPSHOT, Capability.LIVE_MIGRATION} <= unreliable.without


def test_every_operation_has_a_latency():
    for operation in DEFAULT_TIMEOUTS:
        assert LATENCY_OF.get(operation, operation) in Latencies.model_fields


def test_a_file_can_start_from_a_profile_and_change_some_of_it(tmp_path):
    file = tmp_path / "slow.toml"
    file.write_text(
        'extends = "standard"\n[latency]\nstart = 9\n[luck]\nfailures = 0.5\n'
        '[limits]\nmachines = 3\nmemory = "8G"\n[oversubscription]\nmemory = 2\n'
    )
    profile = SimulationProfile.load(str(file))
    assert profile.name == "slow"
    assert (profile.latency.start, profile.latency.stop) == (9, 1)
    assert profile.luck.failures == {"any": 0.5}
    assert profile.limits.machines == 3
    assert profile.limits.vcpus_per_machine == 16
    assert profile.effective_limits.memory == 16 * GIB
    assert profile.effective_limits.vcpus == 512


def test_a_file_of_its_own_is_named_after_itself_and_has_no_limits(tmp_path):
    file = tmp_path / "plain.toml"
    file.write_text("")
    profile = SimulationProfile.load(str(file))
    assert profile.name == "plain"
    assert profile.effective_limits.vcpus is None


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("[latency]\nstart = -1", "latency.start", "0"),
        ("[latency]\nstrat = 1", "latency.strat", "start"),
        ("[luck]\nfailures = {creat = 0.1}", "luck.failures", "create"),
        ("[luck]\nfailures = {wholly_unlike = 0.1}", "luck.failures", "no operation"),
        ("[luck]\nhangs = 1.5", "luck.hangs.any", "1"),
        ("[luck.fail_after]", "luck.fail_after", "operations or seconds"),
        ('extends = "standrad"', "extends", "standard"),
        ("[latency", "document", "TOML"),
        ('without = ["snapshots"]', "without.0", "snapshot"),
    ],
)
def test_a_wrong_file_is_told_by_file_field_and_what_would_be_right(
    tmp_path, text, field, expected
):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InvalidSpec) as caught:
        SimulationProfile.load(str(file))
    assert caught.value.source == str(file)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert expected in problem.expected
    assert caught.value.hint


def test_a_missing_file_and_an_unknown_name_are_told():
    with pytest.raises(InvalidSpec) as caught:
        SimulationProfile.load("/nonexistent/profile.toml")
    assert "readable" in caught.value.problems[0].expected
    with pytest.raises(InvalidSpec) as caught:
        SimulationProfile.load("standart")
    assert "unreliable" in caught.value.problems[0].expected


def test_options_are_read_from_text():
    options = read_options({"profile": "unreliable", "seed": "7", "clock": "wall"})
    assert (options.profile, options.seed, options.clock) == ("unreliable", 7, "wall")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": "x"}, "seed"),
        ({"seed": "-1"}, "seed"),
        ({"clock": "moon"}, "clock"),
        ({"sede": "1"}, "sede"),
        ({"socket": "/s", "clock": "wall"}, "document"),
    ],
)
def test_wrong_options_are_named(options, field):
    with pytest.raises(InvalidSpec) as caught:
        read_options(options)
    assert field in caught.value.message
    assert "profile, seed, clock, socket" in str(caught.value.hint)


def test_the_provider_opens_here_or_elsewhere_and_touches_nothing():
    assert provider.probe().available
    here = provider.open(OWNER, {"seed": "3"})
    assert isinstance(here, SimulatedHypervisor)
    assert (here.seed, here.clock, here.profile.name) == (3, "virtual", "standard")
    there = provider.open(OWNER, {"socket": "/nonexistent/s", "seed": "1"})
    assert isinstance(there, RemoteSimulatedHypervisor)
    assert provider.open(OWNER).seed != provider.open(OWNER).seed


def test_what_no_profile_has_is_declared_with_a_reason():
    for name in BUILT_IN:
        hypervisor = provider.open(OWNER, {"profile": name})
        declared = hypervisor._capabilities
        assert declared.supported.isdisjoint(NEVER)
        assert set(declared.unsupported) == set(Capability) - declared.supported


def test_nothing_is_deterministic_on_the_wall_clock():
    for clock, declared in (("wall", False), ("virtual", True)):
        capabilities = provider.open(OWNER, {"clock": clock})._capabilities
        assert (Capability.DETERMINISTIC in capabilities.supported) is declared
