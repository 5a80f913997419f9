"""What can be asked for: what no calendar has, and no message room for, is refused at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from vmlab.manager.requests import CreateNetwork, MachinePolicy, SnapshotMachine


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
def test_a_time_is_one_in_utc_as_well(text: str) -> None:
    with pytest.raises(ValidationError, match="years 1 to 9999"):
        SnapshotMachine(machine="web", name="clean", expires=datetime.fromisoformat(text))
    there = SnapshotMachine(
        machine="web", name="clean", expires=datetime.fromisoformat("2027-01-31T12:00:00+02:00")
    )
    assert there.expires == datetime(2027, 1, 31, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    "span", [timedelta(0), timedelta(hours=-1), timedelta.max], ids=["none", "back", "longest"]
)
def test_snapshots_have_an_interval_that_can_be_waited_for(span: timedelta) -> None:
    with pytest.raises(ValidationError, match="snapshot_every"):
        MachinePolicy(snapshot_every=span)


def test_a_network_has_as_many_dns_servers_as_an_option_of_dhcp_has_room_for() -> None:
    servers = tuple(f"10.9.0.{number}" for number in range(1, 65))
    assert len(CreateNetwork(name="lan", dns=servers[:16]).dns) == 16
    # In one of 255 bytes there are 63 (RFC 2132, 3.8).
    with pytest.raises(ValidationError, match="dns"):
        CreateNetwork(name="lan", dns=servers)
