"""Findings, operations, networks and the emergency stop in the browser, as a person uses them."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from vmlab.manager.requests import CreateNetwork

from .conftest import PATIENCE_MS, Reader, Site

pytestmark = pytest.mark.timeout(1200)
expect.set_options(timeout=PATIENCE_MS)


def test_a_finding_is_seen_with_its_evidence_and_repaired(reader: Reader, site: Site) -> None:
    machine = site.machine_of("killed", start=True)
    page = reader.open("/ui/findings")
    expect(page.locator("#count")).to_have_text("0 findings")
    reader.mark()

    async def kill() -> None:
        await (await site.manager.machine(machine.id)).kill()

    async def sweep() -> None:
        # A finding is one that two looks at it have confirmed.
        await site.manager.observer.sweep()
        await site.manager.observer.sweep()

    site.run(kill)
    site.run(sweep)
    finding = page.get_by_role("article", name=re.compile("machine-state-mismatch: killed"))
    expect(finding).to_be_visible()
    finding.get_by_text("Evidence").click()
    evidence = finding.get_by_role("region", name=re.compile("evidence"))
    expect(evidence).to_contain_text('"stored": "running"')
    expect(evidence).to_contain_text('"seen": "stopped"')
    finding.get_by_role("button", name=re.compile("Reconcile: machine-state-mismatch")).click()
    expect(page.locator("#said")).to_contain_text("succeeded finding.repair")
    expect(page.locator("#count")).to_have_text("0 findings")
    assert site.machine("killed").state == "running"
    page.get_by_label("Show").select_option("resolved ones")
    expect(finding).to_contain_text("its repair")
    assert reader.is_the_same()
    finding.get_by_role("link", name="its repair").click()
    page.get_by_role("button", name="Undo this repair").click()
    expect(page.locator("#said")).to_contain_text("succeeded finding.repair")
    page.locator("#said").get_by_role("link").click()
    expect(page.locator("#region")).to_contain_text("undoes")
    expect(page.get_by_role("button", name="Undo this repair")).to_have_count(0)


def test_the_emergency_stop_asks_once_and_says_what_it_did(reader: Reader, site: Site) -> None:
    site.machine_of("doomed", start=True, labels={"doom": "yes"})
    site.machine_of("spared", start=True)
    page = reader.open("/ui/machines")
    page.get_by_role("link", name="Emergency stop…").click()
    page.get_by_label("With the label").fill("doom=yes")
    page.get_by_role("button", name="Stop now").click()
    assert site.machine("doomed").state == "running", "nobody said that it is meant"
    page.get_by_label("I want them killed").check()
    page.get_by_role("button", name="Stop now").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("emergency.stop")
    expect(page.locator("#state .badge")).to_have_text("succeeded")
    expect(page.locator("#result")).to_contain_text("doomed")
    expect(page.locator("#result")).not_to_contain_text("spared")
    assert site.machine("doomed").state == "stopped"
    assert site.machine("spared").state == "running"


def test_operations_in_progress_show_their_steps_and_can_be_cancelled(
    reader: Reader, site: Site
) -> None:
    machine = site.machine_of("waiting")
    page = reader.open("/ui/operations")
    with site.held("waiting"):
        held = page.get_by_role("article", name=re.compile("running machine.update of waiting"))
        expect(held.locator("ol.steps li")).to_contain_text("hold its turn")
        other = reader.page.context.new_page()
        other.set_default_timeout(PATIENCE_MS)
        other.goto(f"{site.url}/ui/machines/{machine.id}")
        other.locator("#action-start").click()
        queued = page.get_by_role("article", name=re.compile("queued machine.start of waiting"))
        expect(queued).to_be_visible()
        queued.get_by_role("button", name="Cancel machine.start of waiting").click()
        expect(queued).to_have_count(0)
        expect(other.locator("#said")).to_contain_text("cancelled machine.start")
    expect(held).to_have_count(0)
    expect(page.locator("#region")).to_contain_text("Nothing is.")
    page.get_by_label("State").select_option("cancelled")
    expect(page.locator("#region tbody tr")).to_have_count(1)
    page.get_by_role("link", name="machine.start", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("machine.start of waiting")
    expect(page.locator("#state .badge")).to_have_text("cancelled")


def test_a_network_is_made_and_shows_the_addresses_that_are_used(
    reader: Reader, site: Site
) -> None:
    page = reader.open("/ui/networks")
    page.get_by_text("New network…").click()
    page.get_by_label("Name").fill("backnet")
    page.get_by_label("IPv4 subnet").fill("10.77.0.0/33")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#said").get_by_role("alert")).to_contain_text("subnet")
    page.get_by_label("IPv4 subnet").fill("10.77.0.0/24")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#said")).to_contain_text("succeeded network.create of backnet")
    row = page.locator("#region tr", has_text="backnet")
    expect(row).to_contain_text("10.77.0.0/24")
    machine = site.machine_of("addressed", nics=({"network": "backnet"},), start=True)
    [nic] = machine.nics
    assert nic.addresses, "the machine has an address"
    row.get_by_role("link", name="backnet").click()
    used = page.get_by_role("table", name="Used addresses of backnet")
    expect(used.get_by_role("row").nth(1)).to_contain_text(nic.addresses[0])
    expect(used).to_contain_text(nic.mac)
    used.get_by_role("link", name="addressed").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("addressed")
    expect(page.locator("#region")).to_contain_text(nic.addresses[0])
    page.goto(f"{site.url}/ui/networks/backnet")
    page.get_by_label("Its name, typed").fill("backnet")
    page.get_by_role("button", name="Delete backnet").click()
    expect(page.locator("#said").get_by_role("alert")).to_contain_text("addressed")
    site.do(CreateNetwork(name="idle", subnet="10.78.0.0/24"))
    page.goto(f"{site.url}/ui/networks/idle")
    page.get_by_label("Its name, typed").fill("idle")
    page.get_by_role("button", name="Delete idle").click()
    expect(page.locator("#region")).to_contain_text("there is no network")


def test_templates_hosts_and_events_are_told(reader: Reader, site: Site) -> None:
    page = reader.open("/ui/templates")
    page.get_by_text("New template…").click()
    page.get_by_label("Name").fill("lean")
    page.get_by_label("Image").fill("debian-13-riscv64-tiny")
    page.get_by_label("Memory").fill("128M")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#t-lean")).to_contain_text("128 MiB")
    page.get_by_role("button", name="Delete template lean").click()
    expect(page.locator("#t-lean")).to_have_count(0)

    page = reader.open("/ui/hosts")
    live = page.locator("#h-simulated td").nth(4)
    before = int(live.inner_text())
    site.machine_of("counted", start=True)
    expect(live).to_have_text(str(before + 1))

    page = reader.open("/ui/events")
    page.get_by_label("Of").fill("counted")
    page.get_by_label("Kind").select_option("machine")
    expect(page.locator("#region tbody tr").first).to_contain_text("state: running")
    expect(page.locator("#region tbody tr").last).to_contain_text("machine.created")
