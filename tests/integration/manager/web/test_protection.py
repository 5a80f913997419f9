"""What a page must not do, and what nobody may do by one; and that everybody can use it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from vmlab.machine.places import reports_directory
from vmlab.manager.requests import CreateDisk, CreateNetwork
from vmlab.manager.web.assets import asset_url
from vmlab.report import Recorder

from .conftest import PATIENCE, PATIENCE_MS, Reader, Site

pytestmark = pytest.mark.timeout(1200)
expect.set_options(timeout=PATIENCE_MS)

HOSTILE = "</pre></script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
PAGES = ("machines", "machines/new", "disks", "networks", "templates", "operations", "findings",
         "events", "runs", "hosts", "emergency")  # fmt: skip
MUST = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def violations(page: object) -> list[str]:
    """What axe says is wrong with a page, and where."""
    found = Axe().run(page, options={"runOnly": MUST})
    return [
        f"{each['id']}: {[node['html'][:120] for node in each['nodes']]}"
        for each in found.response["violations"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_can_be_used_by_everybody(reader: Reader, site: Site, scheme: str) -> None:
    machine = site.machine_of(f"seen-{scheme}", start=True)
    site.do(CreateDisk(name=f"seen-{scheme}", size="1M"))
    site.do(CreateNetwork(name=f"seen-{scheme}"))
    # It has ended: what is looked at does not change meanwhile.
    operation = site.do(CreateDisk(name=f"seen-2-{scheme}", size="1M"))
    reader.page.emulate_media(color_scheme=scheme)
    named = (f"machines/{machine.id}", f"networks/seen-{scheme}", f"operations/{operation.id}")
    wrong = {}
    for path in (*PAGES, *named):
        page = reader.open(f"/ui/{path}")
        for summary in page.locator("summary").all():
            summary.click()
        if found := violations(page):
            wrong[path] = found
    assert wrong == {}
    assert {url for url in reader.requests if not url.startswith(site.url)} == set()


def test_what_a_guest_or_a_person_wrote_is_shown_and_never_run(reader: Reader, site: Site) -> None:
    machine = site.machine_of("hostile", labels={"note": HOSTILE})
    page = reader.open(f"/ui/machines/{machine.id}")
    assert HOSTILE in page.locator("#region").inner_text()
    page = reader.open("/ui/machines?name=hostile")
    assert HOSTILE in page.locator("#region").inner_text()
    assert page.title() == "Machines · vmlab"
    assert page.locator("img").count() == 0
    with page.expect_console_message(
        lambda message: "Content Security Policy" in message.text, timeout=PATIENCE_MS
    ):
        page.evaluate(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
            "document.body.append(s)"
        )
    assert page.evaluate("window.ran === undefined"), "the policy lets nothing inline run"
    reader.complaints.clear()


def test_changes_are_taken_from_pages_of_its_own_alone(site: Site) -> None:
    machine = site.machine_of("target")
    own = {"origin": site.url}
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:

        def press(headers: dict[str, str], **data: str) -> httpx.Response:
            path = f"/ui/machines/{machine.id}/actions"
            return client.post(path, data={"action": "start"} | data, headers=headers)

        for headers in (
            {},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            own | {"sec-fetch-site": "cross-site"},
        ):
            assert press(headers).status_code == 403, headers
        assert site.machine("target").state == "created"
        assert press(own, action="explode").status_code == 422
        assert client.get("/ui/machines", headers={"host": "evil.example"}).status_code == 403
        broken = {"content-type": "application/x-www-form-urlencoded"} | own
        path = f"/ui/machines/{machine.id}/actions"
        assert client.post(path, content=b"action=%ff\xff", headers=broken).status_code == 400
        assert client.post(path, json={"action": "start"}, headers=own).status_code == 400
        assert (
            client.post(path, content=b"a=" + b"b" * (1 << 20), headers=broken).status_code == 413
        )
        assert press(own).status_code == 303

        assert client.get("/").headers["location"] == "/ui/machines"
        unsure = client.post("/ui/emergency", data={"host": "simulated"}, headers=own)
        assert unsure.status_code == 422
        assert "a tick" in unsure.text
        site.do(CreateDisk(name="small-disk", size="1M"))
        for fields, status in (({"action": "resize", "size": "2M"}, 303), ({"action": "x"}, 422)):
            answer = client.post("/ui/disks/small-disk/actions", data=fields, headers=own)
            assert answer.status_code == status
        elsewhere = {"origin": "http://evil.example"}
        assert client.post("/ui/logout", headers=elsewhere).status_code == 403
        assert client.post("/ui/login", data={"token": " "}, headers=own).status_code == 401
        nobody_asks = client.post("/ui/login", data={"token": "any"}, headers=own)
        assert nobody_asks.status_code == 303

        page = client.get("/ui/machines")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        style = client.get(asset_url("page.css"))
        assert "immutable" in style.headers["cache-control"]
        stale = asset_url("page.css").replace("/assets/", "/assets/0")
        assert client.get(stale).status_code == 404


def test_nobody_gets_in_without_a_token_and_a_token_allows_what_it_says(
    browser: Browser, guarded_site: Site
) -> None:
    site = guarded_site
    machine = site.machine_of("guarded")
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{site.url}/ui/machines/{machine.id}")
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    assert violations(page) == []
    page.get_by_label("Token").fill("vml_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("not valid")
    page.get_by_label("Token").fill(site.token("reader", "read"))
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("guarded")
    expect(page.get_by_role("button", name="Start")).to_have_count(0)
    expect(page.get_by_role("link", name="Emergency stop…")).to_have_count(0)
    [cookie] = context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    page.get_by_role("button", name="Log out admin").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    assert context.cookies() == []

    token = site.token("operator", "operate")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    page.goto(f"{site.url}/ui/machines/{machine.id}")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#state .badge")).to_have_text("running")
    expect(page.get_by_role("group", name="Terminal")).to_contain_text("login:")
    own = {"origin": site.url, "cookie": f"vmlab-token={token}"}
    path = f"{site.url}/ui/machines/{machine.id}/actions"
    without_word = httpx.post(path, data={"action": "stop"}, headers=own, timeout=PATIENCE)
    assert without_word.status_code == 403
    assert site.machine("guarded").state == "running"
    part = {"hx-request": "true", "hx-current-url": f"{site.url}/ui/disks"}
    unknown = httpx.get(f"{site.url}/ui/disks", headers=part, timeout=PATIENCE)
    assert unknown.headers["hx-redirect"] == "/ui/login?next=/ui/disks"
    away = {"token": token, "next": "//evil.example/ui/"}
    answer = httpx.post(
        f"{site.url}/ui/login", data=away, headers={"origin": site.url}, timeout=PATIENCE
    )
    assert answer.headers["location"] == "/ui/machines"
    context.close()


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test run's report where the lab keeps them, and where no other test has left any."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = reports_directory() / "20260101T000000Z-web"
    directory.mkdir(parents=True)
    recorder = Recorder.create(directory, tool="vmlab test", seed=42)
    with recorder.start("boot", "test_boots", hypervisor="qemu") as attempt:
        attempt.machine("vm", hypervisor="qemu")
        attempt.check("state", False, HOSTILE, expected="up", actual="gone")
        attempt.attach("console-vm.log", f"{HOSTILE}\n")
    recorder.close()
    (reports_directory() / "20260102T000000Z-broken").mkdir()
    return directory


def test_test_runs_of_the_lab_are_listed_and_their_reports_are_harmless(
    reader: Reader, site: Site, run_directory: Path
) -> None:
    page = reader.open("/ui/runs")
    rows = page.locator("#region tbody tr")
    expect(rows.first).to_contain_text("cannot read a report")
    expect(rows.nth(1).locator(".badge")).to_have_text("fail")
    expect(rows.nth(1)).to_contain_text("vmlab test")
    page.get_by_role("link", name=run_directory.name).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("fail vmlab test")
    assert HOSTILE in page.locator("body").text_content()
    assert page.evaluate("self.origin") == "null", "it can reach nothing of the service"
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        files = f"/ui/runs/{run_directory.name}/files"
        href = page.get_by_role("link", name="console-vm.log").first.get_attribute("href")
        assert href.startswith(files)
        log = client.get(href)
        assert HOSTILE in log.text
        assert log.headers["content-type"].startswith("text/plain")
        assert "sandbox" in log.headers["content-security-policy"]
        for path in ("report.json", "../report.json", "%2e%2e/%2e%2e/x", "/etc/passwd"):
            assert client.get(f"{files}/{path}").status_code == 404, path
        assert client.get("/ui/runs/latest").status_code == 404
        assert client.get("/ui/runs/%2e%2e").status_code == 404
