"""Machines in the browser: made, seen to run, used, changed and deleted, as a person does it."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from vmlab.machine.errors import MachineNotFound
from vmlab.manager.requests import (
    CreateDisk,
    DeleteDisk,
    PauseMachine,
    ResumeMachine,
    StartMachine,
    StopMachine,
    UpdateMachine,
)

from .conftest import PATIENCE_MS, Reader, Site

pytestmark = pytest.mark.timeout(1200)
expect.set_options(timeout=PATIENCE_MS)


def test_a_machine_is_made_and_seen_to_run_without_a_reload(reader: Reader, site: Site) -> None:
    page = reader.open("/ui/machines")
    page.get_by_role("link", name="New machine…").click()
    page.get_by_label("Name", exact=True).fill("fresh")
    page.get_by_label("Template").select_option("small")
    page.get_by_label("Host").select_option("simulated")
    page.get_by_label("Labels").fill("team=red tier=front")
    expect(page.get_by_label("Start it now")).to_be_checked()
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("fresh")
    reader.mark()
    expect(page.locator("#state .badge")).to_have_text("running")

    boot = page.locator("#boot")
    drawn = boot.get_by_role("img", name="Timeline from 0.00 s")
    expect(drawn.locator("g.mark text", has_text="running")).to_have_count(1)
    expect(drawn.locator("g.phase text", has_text="boot")).to_have_count(1)
    expect(boot).to_contain_text("It took")

    charts = page.locator("#metrics")
    memory = charts.get_by_role("img", name=re.compile("memory held: now .*B"))
    expect(memory).to_be_visible()
    expect(charts.get_by_role("img", name=re.compile(r"processor.*: now \d"))).to_be_visible()

    console = page.get_by_role("group", name="Terminal")
    expect(console).to_contain_text("Linux version 6.12.0-sim")
    expect(page.locator("#console-status")).to_have_text("It is connected.")

    assert reader.is_the_same(), "nothing of this took a reload"
    machine = site.machine("fresh")
    assert machine.state == "running"
    assert machine.labels == {"team": "red", "tier": "front"}


def test_what_is_typed_on_the_console_reaches_the_machine(reader: Reader, site: Site) -> None:
    machine = site.machine_of("typist", start=True)
    page = reader.open(f"/ui/machines/{machine.id}")
    console = page.get_by_role("group", name="Terminal")
    expect(console).to_contain_text("login:")
    page.locator(".xterm-helper-textarea").focus()
    page.keyboard.type("tty-7")
    page.keyboard.press("Enter")
    expect(console).to_contain_text("tty-7")
    page.keyboard.press("Tab")
    expect(page.locator(".xterm-helper-textarea")).to_be_focused()
    page.keyboard.press("Control+]")
    expect(page.get_by_role("heading", name="Disks")).to_be_focused()

    site.do(StopMachine(machine="typist", graceful=False))
    expect(page.locator("#state .badge")).to_have_text("stopped")
    site.do(StartMachine(machine="typist"))
    expect(console).to_contain_text("boot 2")


def test_the_list_is_live_whoever_changes_a_machine(reader: Reader, site: Site) -> None:
    machine = site.machine_of("watched", start=True)
    page = reader.open("/ui/machines?name=watched")
    row = page.locator(f"#m-{machine.id}")
    expect(row).to_contain_text("running")
    reader.mark()
    site.do(PauseMachine(machine="watched"))
    expect(row).to_contain_text("paused")
    expect(row.get_by_role("button")).to_have_text(["Stop", "Kill", "Resume"])
    site.do(ResumeMachine(machine="watched"))
    expect(row).to_contain_text("running")
    site.do(UpdateMachine(machine="watched", labels={"seen": "yes"}))
    expect(row).to_contain_text("seen=yes")
    assert reader.is_the_same()


def test_a_keyboard_is_enough_and_never_loses_its_place(reader: Reader, site: Site) -> None:
    machine = site.machine_of("keys")
    page = reader.open("/ui/machines?name=keys")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    start = page.get_by_role("button", name="Start keys", exact=True)
    for _ in range(12):
        page.keyboard.press("Tab")
        if start.evaluate("button => button === document.activeElement"):
            break
    expect(start).to_be_focused()
    page.keyboard.press("Enter")
    row = page.locator(f"#m-{machine.id}")
    expect(row).to_contain_text("running")
    expect(page.locator("#said")).to_contain_text("succeeded machine.start of keys")
    expect(start).to_have_count(0)
    # The button is gone, and the focus is where it was.
    expect(page.locator(f"#m-{machine.id}:focus-within")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop keys")).to_be_focused()


def test_filters_leave_what_was_asked_for_and_can_be_linked_to(reader: Reader, site: Site) -> None:
    for name, labels in (("alpha-1", {"zone": "a"}), ("alpha-2", {"zone": "b"}), ("beta", {})):
        site.machine_of(name, labels=labels)
    page = reader.open("/ui/machines")
    reader.mark()
    count = page.locator("#count")
    page.get_by_label("Name").fill("alpha")
    expect(count).to_have_text("2 machines")
    expect(page.locator("#machines tbody th")).to_have_text(["alpha-1", "alpha-2"])
    page.get_by_label("Label").fill("zone=b")
    expect(count).to_have_text("1 machine")
    page.get_by_label("State").select_option("running")
    expect(page.locator("#region")).to_contain_text("No machine is like that.")
    assert reader.is_the_same()
    page.get_by_label("State").select_option("")
    expect(count).to_have_text("1 machine")
    site.do(UpdateMachine(machine="alpha-1", labels={"zone": "b"}))
    expect(count).to_have_text("2 machines")
    page.reload()
    expect(count).to_have_text("2 machines")
    expect(page.get_by_label("Name")).to_have_value("alpha")


def test_a_disk_is_made_attached_and_detached(reader: Reader, site: Site) -> None:
    site.machine_of("keeper", start=True)
    page = reader.open("/ui/disks")
    page.get_by_text("New disk…").click()
    page.get_by_label("Name").last.fill("ledger")
    page.get_by_label("Size").fill("one gigabyte")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#said").get_by_role("alert")).to_contain_text('such as "512M"')
    page.get_by_label("Size").fill("8M")
    page.get_by_role("button", name="Create").click()
    row = page.locator("tr", has_text="ledger")
    expect(row).to_contain_text("available")

    page = reader.open(f"/ui/machines/{site.machine('keeper').id}")
    reader.mark()
    page.get_by_label("Name of the snapshot").fill("half-typed")
    page.get_by_label("Disk to attach").select_option("ledger")
    page.get_by_role("button", name="Attach").click()
    expect(page.locator("#said")).to_contain_text("succeeded disk.attach of ledger")
    expect(page.locator("#disks tbody tr")).to_contain_text("ledger")
    expect(page.locator("#disks")).to_contain_text("No disk is free.")
    expect(page.get_by_label("Name of the snapshot")).to_have_value("half-typed")
    assert [disk.name for disk in site.machine("keeper").disks] == ["ledger"]
    page.get_by_role("button", name="Detach ledger").click()
    expect(page.get_by_label("Disk to attach")).to_be_visible()
    assert site.machine("keeper").disks == ()
    assert reader.is_the_same()

    page = reader.open("/ui/disks?name=ledger")
    page.get_by_text("Resize or delete…").click()
    page.get_by_label("To delete it with its data, type its name").fill("ledge")
    page.get_by_role("button", name="Delete ledger").click()
    expect(page.locator("#said").get_by_role("alert")).to_contain_text("'ledger'")
    page.get_by_label("To delete it with its data, type its name").fill("ledger")
    page.get_by_role("button", name="Delete ledger").click()
    expect(page.locator("#region")).to_contain_text("There is no such disk.")


def test_a_machine_is_snapshotted_cloned_renamed_and_deleted(reader: Reader, site: Site) -> None:
    machine = site.machine_of("origin")
    page = reader.open(f"/ui/machines/{machine.id}")
    page.get_by_label("Name of the snapshot").fill("clean")
    page.get_by_role("button", name="Take a snapshot").click()
    expect(page.locator("#s-clean")).to_be_visible()
    page.get_by_text("Clone…").click()
    page.get_by_label("Name of the clone").fill("copy")
    page.get_by_role("button", name="Clone").click()
    expect(page.locator("#said")).to_contain_text("succeeded machine.clone")
    assert site.machine("copy").state in ("created", "stopped")
    page.get_by_text("Name and labels…").click()
    page.locator("#update-name").fill("origin-2")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#said")).to_contain_text("succeeded machine.update")
    assert site.machine(machine.id).name == "origin-2"

    page = reader.open(f"/ui/machines/{machine.id}")
    page.get_by_text("Delete…").click()
    page.get_by_label("Its name, typed").fill("origin")
    page.get_by_role("button", name="Delete origin-2").click()
    alert = page.locator("#said").get_by_role("alert")
    expect(alert).to_contain_text("'origin-2', the name of the machine")
    assert site.machine(machine.id).name == "origin-2"
    page.get_by_label("Its name, typed").fill("origin-2")
    page.get_by_role("button", name="Delete origin-2").click()
    expect(page.locator("#region")).to_contain_text("there is no machine")
    with pytest.raises(MachineNotFound):
        site.machine(machine.id)


def test_a_form_that_cannot_work_says_why_beside_its_fields(reader: Reader, site: Site) -> None:
    site.machine_of("taken")
    page = reader.open("/ui/machines/new")
    page.get_by_label("Name", exact=True).fill("-no-")
    page.get_by_label("Memory").fill("much")
    page.get_by_label("Template").select_option("small")
    page.get_by_role("button", name="Create").click()
    memory = page.get_by_label("Memory")
    expect(memory).to_have_value("much")
    expect(memory).to_have_attribute("aria-invalid", "true")
    about = page.locator(f"#{memory.get_attribute('aria-describedby')}")
    expect(about).to_contain_text('such as "512M"')
    expect(page.get_by_label("Name", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Template")).to_have_value("small")
    page.get_by_label("Name", exact=True).fill("taken")
    page.get_by_label("Memory").fill("64M")
    page.get_by_label("Host").select_option("simulated")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("alert")).to_contain_text("taken")
    site.do(CreateDisk(name="spare", size="1M"))
    page.reload()
    expect(page.get_by_label("Disks")).to_contain_text("spare")
    site.do(DeleteDisk(disk="spare"))  # other tests count the disks that are free
