"""A machine with a real guest in the browser: made, watched, typed to, given a disk and deleted."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from tests.store import IMAGE_STORE

from vmlab.machine.errors import MachineNotFound
from vmlab.manager.settings import HostSetting

from .conftest import PATIENCE_MS, Site, reading

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(1200)]
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture
def qemu_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A service of a manager with QEMU alone, which leaves no machine behind."""
    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    directory = Path(tempfile.mkdtemp(prefix="vmlab-w-"))
    with Site(directory, host=HostSetting(name="qemu", hypervisor="qemu")) as made:
        try:
            yield made
        finally:
            made.run(lambda: _delete_all(made))
    shutil.rmtree(directory)


async def _delete_all(site: Site) -> None:
    for machine in await (await site.manager.hosts.get("qemu")).list():
        await machine.delete(force=True)


def test_a_person_works_with_a_real_guest(browser: Browser, qemu_site: Site) -> None:
    site = qemu_site
    with reading(browser, site) as reader:
        page = reader.open("/ui/machines/new")
        page.get_by_label("Name", exact=True).fill("real")
        page.get_by_label("Image").fill("debian-12-amd64-tiny")
        page.get_by_label("Memory").fill("256M")
        page.get_by_role("button", name="Create").click()
        expect(page.locator("#state .badge")).to_have_text("running")
        drawn = page.locator("#boot").get_by_role("img", name="Timeline from 0.00 s")
        expect(drawn.locator("g.mark text", has_text="running")).to_have_count(1)
        memory = page.locator("#metrics").get_by_role(
            "img", name=re.compile("memory held: now .*B")
        )
        expect(memory).to_be_visible()

        console = page.get_by_role("group", name="Terminal")
        console.scroll_into_view_if_needed()  # a terminal out of sight is not drawn
        expect(console).to_contain_text("activate this console")
        _at_the_console(page, console)
        page.keyboard.type("echo $((40 + 2)) typed")
        page.keyboard.press("Enter")
        expect(console).to_contain_text("42 typed")

        page = reader.open("/ui/disks")
        page.get_by_text("New disk…").click()
        page.get_by_label("Name").last.fill("ledger")
        page.get_by_label("Size").fill("8M")
        page.get_by_role("button", name="Create").click()
        expect(page.locator("tr", has_text="ledger")).to_contain_text("available")
        page = reader.open(f"/ui/machines/{site.machine('real').id}")
        page.get_by_label("Disk to attach").select_option("ledger")
        page.get_by_role("button", name="Attach").click()
        expect(page.locator("#said")).to_contain_text("succeeded disk.attach of ledger")
        _at_the_console(page, console)
        # The guest finds a disk a while after it was given it.
        sectors = "until grep $((128 * 128)) /sys/block/vd?/size; do sleep 1; done"
        page.keyboard.type(sectors)
        page.keyboard.press("Enter")
        expect(console).to_contain_text("16384")

        page.get_by_role("button", name="Kill").click()
        expect(page.locator("#state .badge")).to_have_text("stopped")
        page.get_by_text("Delete…").click()
        page.get_by_label("Its name, typed").fill("real")
        page.get_by_role("button", name="Delete real").click()
        expect(page.locator("#region")).to_contain_text("there is no machine")
    with pytest.raises(MachineNotFound):
        site.machine("real")


def _at_the_console(page: Page, console: Locator) -> None:
    """Sit down at the console: its shell begins when Enter is pressed."""
    expect(page.locator("#console-status")).to_have_text("It is connected.")
    page.locator(".xterm-helper-textarea").focus()
    page.keyboard.press("Enter")
    expect(console).to_contain_text("#")
