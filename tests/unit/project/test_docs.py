"""The documentation builds strictly, needs no network to read, and says nothing untrue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import docs_hooks
import pytest
import typer.main

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import COMMANDS, app
from vmlab.machine.capabilities import Capability
from vmlab.machine.events import EventType
from vmlab.machine.faults import FaultKind
from vmlab.machine.states import OPERATIONS, TRANSITIONS, MachineState
from vmlab.manager.settings import VARIABLES, Limits, Settings

ROOT = Path(__file__).parents[3]
needs_graphviz = pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz is not installed (tools/debian-packages test)"
)
PROSE = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    if "decisions" not in path.parts
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Loaded(HTMLParser):
    """Collects what a browser would load to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in {"script", "img", "iframe", "source"} and values.get("src"):
            self.addresses.append(str(values["src"]))
        if tag == "link" and values.get("rel") not in {"canonical", "next", "prev"}:
            self.addresses.append(str(values["href"]))


@needs_graphviz
def test_reading_the_docs_needs_no_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(docs_hooks.PAGES)
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text())
        assert loaded.addresses
        assert [each for each in loaded.addresses if re.match(r"(?:\w+:)?//", each)] == [], page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"@import[^;]*|url\(['\"]?(?:https?:)?//[^)]*\)", styles) == []


@needs_graphviz
def test_the_state_diagram_is_drawn_from_the_table(site: Path) -> None:
    page = (site / "reference/states.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    (svg,) = (drawing for drawing in drawings if "&#45;&gt;" in drawing)  # the others are icons
    for state in MachineState:
        assert f">{state.value}</text>" in svg
    assert "created&#45;&gt;starting" in svg
    assert "deleted&#45;&gt;" not in svg
    for operation in OPERATIONS:
        assert f"<code>{operation}</code>" in page


def test_the_state_page_lists_every_transition() -> None:
    rows = {
        row[0].strip(" `"): set(re.findall(r"`([\w-]+)`", row[1]))
        for row in re.findall(r"^\| (`\w+`) \| (.*) \|$", docs_hooks.states_page(), re.MULTILINE)
        if row[0].strip("`") in list(MachineState)
    }
    assert rows == {
        state.value: {target.value for target in targets} for state, targets in TRANSITIONS.items()
    }


def test_reference_pages_leave_nothing_out() -> None:
    capabilities, faults = docs_hooks.capabilities_page(), docs_hooks.faults_page()
    events, codes = docs_hooks.events_page(), docs_hooks.exit_codes_page()
    assert all(f"`{each.value}`" in capabilities for each in Capability)
    assert all(f"### {each.value}" in faults for each in FaultKind)
    assert all(f"`{each.value}`" in events for each in EventType)
    assert all(f"| `{each.value}` |" in codes for each in ExitCode)
    assert all(f"## vmlab {entry.name}" in docs_hooks.command_line_page() for entry in COMMANDS)


def test_every_setting_of_the_manager_has_a_variable_that_the_reference_tells_of() -> None:
    settable = set(Settings.model_fields) - {"home", "limits"}
    settable |= {f"limits.{name}" for name in Limits.model_fields}
    assert set(VARIABLES.values()) == settable
    rows = {
        row[0]: row[1:]
        for row in re.findall(
            r"^\| `(VMLAB_\w+)` \| (.*) \| (.+) \|$", docs_hooks.manager_page(), re.MULTILINE
        )
    }
    others = {"VMLAB_HOME", "VMLAB_URL", "VMLAB_TOKEN", "VMLAB_LINGER_SECONDS"}
    assert set(rows) == set(VARIABLES) | others
    assert rows["VMLAB_EVENTS_KEPT"][0] == f"{Settings.model_fields['events_kept'].default:,}"
    assert rows["VMLAB_STOP_SECONDS"] == ("30", "seconds that a guest has to shut down")
    assert rows["VMLAB_LIMIT_MEMORY"][0] == "what the host has"


def blocks(path: Path, language: str) -> Iterator[str]:
    for match in re.finditer(rf"^```{language}[^\n]*\n(.*?)^```", path.read_text(), re.M | re.S):
        yield match[1]


def saved_files(path: Path) -> dict[str, str]:
    """What a page tells its reader to save, by file name."""
    return {
        match[1]: match[2]
        for match in re.finditer(
            r"Save this as `([\w.]+)`[^`]*(?:`[^`\n]+`[^`]*)*?^```\w+\n(.*?)^```",
            path.read_text(),
            re.M | re.S,
        )
    }


def indented(path: Path) -> Iterator[str]:
    yield from re.findall(r"^ {4}(\S.*)$", path.read_text(), re.MULTILINE)


def vmlab_calls(path: Path) -> Iterator[list[str]]:
    """The arguments of every `vmlab` that a page tells its reader to call."""
    lines = [line for block in blocks(path, "shell") for line in block.splitlines()]
    lines += indented(path)
    lines += [f"vmlab {each}" for each in re.findall(r"`vmlab ([^`]+)`", path.read_text())]
    for line in lines:
        if match := re.match(r"(?:\.venv/bin/)?vmlab( .*)?$", line.strip()):
            yield re.split(r"\s+#|[|>]", match[1] or "")[0].split()


@pytest.mark.parametrize("page", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_the_docs_name_exists_with_its_options(page: Path) -> None:
    group = typer.main.get_command(app)
    for call in vmlab_calls(page):
        command, context = group, group.make_context("vmlab", [], resilient_parsing=True)
        # What follows `--` is the guest's.
        words = call[: call.index("--")] if "--" in call else list(call)
        while words and hasattr(command, "get_command") and not words[0].startswith("-"):
            name = words.pop(0)
            below = command.get_command(context, name)
            assert below is not None, f"{page.name}: there is no `vmlab {' '.join(call)}`"
            context = below.make_context(name, [], parent=context, resilient_parsing=True)
            command = below
        if context.ignore_unknown_options:
            continue  # pytest's options, which are not known here
        known = {option for each in command.get_params(context) for option in each.opts}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in known, f"{page.name}: {' '.join(call)}: {word}"


@pytest.mark.timeout(660)  # one of them builds an image
@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PROSE
        for number, code in enumerate(blocks(page, "python"), 1)
    ],
)
def test_python_in_the_docs_runs(page: Path, code: str, tmp_path: Path) -> None:
    for name, content in saved_files(page).items():
        (tmp_path / name).write_text(content)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        # A manager that it begins leaves soon, and not before the next line.
        env={**os.environ, "VMLAB_LINGER_SECONDS": "15"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_tutorial_s_outage_is_the_same_twice(tmp_path: Path) -> None:
    script = tmp_path / "outage.py"
    script.write_text(saved_files(ROOT / "docs/tutorial/first-steps.md")[script.name])
    first, second = (
        subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert "the machine is running" in first
    assert "an hour later it is failed" in first
    assert "and now it is running" in first
    assert first == second


def test_profiles_in_the_docs_are_profiles(tmp_path: Path) -> None:
    from vmlab.hypervisors.simulated.profile import SimulationProfile

    profiles = [
        text for page in PROSE for text in blocks(page, "toml") if text.startswith("extends")
    ]
    assert profiles
    for text in profiles:
        path = tmp_path / "profile.toml"
        path.write_text(text)
        assert SimulationProfile.load(str(path)).name


@pytest.mark.parametrize("page", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_the_project_s_own_files_lead_somewhere(page: Path) -> None:
    generated = {ROOT / "docs" / path for path in docs_hooks.PAGES}
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link:
            target = (page.parent / link).resolve()
            assert target.exists() or target in generated, f"{page.name}: {link}"


def test_hints_in_the_code_name_commands_that_exist() -> None:
    named = {
        (path.relative_to(ROOT), command)
        for path in (ROOT / "src").rglob("*.py")
        for command in re.findall(r"`vmlab ([a-z][a-z-]*)", path.read_text())
    }
    existing = {entry.name for entry in COMMANDS}
    assert {each for each in named if each[1] not in existing} == set()
