"""The workflows of examples/ci: their commands are run as the CI system would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from junitparser import JUnitXml

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "ci"

PASSES = "def test_starts(vm):\n    assert vm.alive\n"
FAILS = "def test_stops(vm):\n    assert not vm.alive, 'it runs'\n"
DIES = "import os, signal\ndef test_dies(vm):\n    os.kill(os.getpid(), signal.SIGKILL)\n"


@dataclass
class Workflow:
    """What a workflow runs, what it runs in any case afterwards, and what it publishes."""

    commands: list[str] = field(default_factory=list)
    always: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def _github(project: Path) -> Workflow:
    document = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    (job,) = document["jobs"].values()
    found = Workflow(environment={"GITHUB_STEP_SUMMARY": str(project / "summary.md")})
    for name, value in job["env"].items():
        found.environment[name] = value.replace("${{ github.workspace }}", str(project))
    for step in job["steps"]:
        if "run" in step:
            where = found.always if step.get("if") == "always()" else found.commands
            where.append(step["run"])
        if "upload-artifact" in step.get("uses", ""):
            found.published += step["with"]["path"].split()
        if "junit-report" in step.get("uses", ""):
            found.published.append(step["with"]["report_paths"])
    found.published.append("summary.md")
    return found


def _gitlab(project: Path) -> Workflow:
    (job,) = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text()).values()
    variables = {"CI_PROJECT_DIR": str(project)}
    for name, value in job["variables"].items():
        variables[name] = value.replace("$CI_PROJECT_DIR", str(project))
    artifacts = job["artifacts"]
    assert artifacts["when"] == "always"
    return Workflow(
        commands=[*job["before_script"], *job["script"]],
        always=job["after_script"],
        published=[*artifacts["paths"], artifacts["reports"]["junit"]],
        environment=variables,
    )


def _jenkins(project: Path) -> Workflow:
    text = (EXAMPLES / "Jenkinsfile").read_text()
    text = re.sub(r"(?m)^\s*//.*$", "", text)
    stages, post = text.split("    post {")
    shell = re.compile(r"\bsh ('''(?P<long>.*?)'''|'(?P<short>[^']*)')", re.DOTALL)

    def commands(part: str) -> list[str]:
        return [(m["long"] or m["short"]).strip() for m in shell.finditer(part)]

    variables = dict(re.findall(r'(?m)^\s+([A-Z_]+) = "(.*)"$', stages))
    for name, value in variables.items():
        for known, meant in (("WORKSPACE", str(project)), ("BUILD_NUMBER", "7")):
            value = value.replace(f"${{{known}}}", meant)
        variables[name] = value.replace("${PATH}", os.environ["PATH"])
    (directory,) = re.findall(r"reportDir: '(.*?)'", post)
    (page,) = re.findall(r"reportFiles: '(.*?)'", post)
    return Workflow(
        commands(stages),
        commands(post),
        [*re.findall(r"junit '(.*?)'", post), f"{directory}/{page}", variables["REPORTS"]],
        variables,
    )


WORKFLOWS = {"github": _github, "gitlab": _gitlab, "jenkins": _jenkins}


def _installs(command: str) -> bool:
    """Whether it brings what is here already: another place's Python packages, not this tree's."""
    return shlex.split(command)[:2] == ["pip", "install"] or " -m venv " in command


def _run(command: str, project: Path, workflow: Workflow) -> subprocess.CompletedProcess[str]:
    here = str(Path(sys.executable).parent)
    environment = {**os.environ, **workflow.environment}
    environment["PATH"] = f"{here}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", command],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def _project(path: Path, test: str) -> Path:
    """A project whose tests run on simulated machines unless something else is asked for."""
    (path / "tests").mkdir(parents=True)
    (path / "tests" / "test_machines.py").write_text(test)
    (path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\n"
        'vm_hypervisor = ["simulated"]\n'
        'addopts = "-p no:cacheprovider"\n'
    )
    return path


CASES = [
    pytest.param("github", PASSES, True, [], id="github-passes"),
    *(
        pytest.param(system, PASSES + FAILS, False, ["failure"], id=f"{system}-fails")
        for system in WORKFLOWS
    ),
    pytest.param("gitlab", DIES, False, ["error"], id="gitlab-dies"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("system", "test", "passed", "outcomes"), CASES)
def test_the_commands_test_and_publish(
    system: str, test: str, passed: bool, outcomes: list[str], tmp_path: Path
) -> None:
    project = _project(tmp_path / "project", test)
    workflow = WORKFLOWS[system](project)
    commands = [command for command in workflow.commands if not _installs(command)]
    assert any(command.startswith("vmlab test") for command in commands)
    done = [_run(command, project, workflow) for command in commands]
    assert [each.returncode == 0 for each in done[:-1]] == [True] * (len(done) - 1), done
    assert (done[-1].returncode == 0) is passed, done[-1].stdout + done[-1].stderr
    for command in workflow.always:
        after = _run(command, project, workflow)
        assert after.returncode == 0, after.stderr
    for published in workflow.published:
        assert (project / published).exists(), published
    results = [case for suite in JUnitXml.fromfile(str(project / "junit.xml")) for case in suite]
    found = [result._tag for case in results for result in case.result]
    assert found == outcomes
    page = next(project / path for path in workflow.published if path.endswith(".html"))
    assert "test_machines.py" in page.read_text()


@pytest.mark.parametrize("system", WORKFLOWS)
def test_what_they_install_exists(system: str, tmp_path: Path) -> None:
    commands = [line for line in WORKFLOWS[system](tmp_path).commands if _installs(line)]
    (install,) = [shlex.split(line) for line in commands if line.startswith("pip")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, extras = re.fullmatch(r"([a-z]+)\[([a-z,]+)\]", install[2]).groups()  # type: ignore[union-attr]
    assert name == project["name"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
