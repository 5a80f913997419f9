"""The checker refuses files that name an index, a mirror or somebody's machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check_no_mirrors
import pytest

HASH = "--hash=sha256:" + "0" * 64

# Joined here, so that this file itself passes the check.
INDEXES = [
    "https://" + "pypi" + ".org/simple",
    "files." + "pythonhosted" + ".org",
    "http://deb." + "debian" + ".org/debian",
    "ftp.de." + "debian" + ".org",
    "security." + "debian" + ".org",
    "http://archive." + "ubuntu" + ".com/ubuntu",
    "mirrors." + "example" + ".edu",
    "https://registry." + "npmjs" + ".org",
]


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_or_mirror_is_refused(index: str) -> None:
    [(number, problem)] = check_no_mirrors.problems_in_text(f"first\nURL = '{index}'\n")
    assert number == 2
    assert "names the package index or mirror" in problem


@pytest.mark.parametrize(
    "text",
    [
        "see https://wiki.debian.org/RepositoryFormat",
        "https://www.debian.org/doc/debian-policy/",
        "https://no-color.org",
        "deb822 sources; the mirror comes from apt's configuration",
        "mirror = host.mirrors[0]",
        "/root/.ssh/authorized_keys and /usr/lib/python3/dist-packages",
        "sources.list.d/debian.sources",
        "http://127.0.0.1:8080/debian",
    ],
)
def test_documentation_and_settings_are_no_mirrors(text: str) -> None:
    assert list(check_no_mirrors.problems_in_text(text)) == []


@pytest.mark.parametrize(
    "path",
    [
        str(check_no_mirrors.ROOT) + "/src",
        "/" + "workspace/vmlab/x.py",
        "/" + "Users/someone",
        "/" + "home/runner/vmlab",
    ],
)
def test_a_machine_path_is_refused(path: str) -> None:
    assert any(
        "holds the machine path" in problem
        for _, problem in check_no_mirrors.problems_in_text(f"path = '{path}'")
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"--index-url somewhere\na==1 {HASH}", "chooses an index with"),
        (f"--extra-index-url=x\na==1 {HASH}", "chooses an index with"),
        (f"--find-links=x\na==1 {HASH}", "chooses an index with"),
        ("a==1", "has no hash: 'a==1'"),
        (f"a>=1 {HASH}", "is not pinned to one version"),
        (f"a @ file:a.whl {HASH}", "takes a package from a URL or a path"),
        (f"a==1 \\\n    {HASH}\nb==2 \\\n    # via a", "has no hash: 'b==2'"),
    ],
)
def test_constraints_are_pinned_hashed_and_name_no_place(line: str, problem: str) -> None:
    found = [text for _, text in check_no_mirrors.problems_in_text(line, constraints=True)]
    assert any(problem in text for text in found), found


def test_good_constraints_pass() -> None:
    text = f"# made by make lock\na-b.c==1.0 ; python_version < '4' \\\n    {HASH}\n    # via d\n"
    assert list(check_no_mirrors.problems_in_text(text, constraints=True)) == []


def test_a_bad_file_fails_the_command_with_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "constraints-bad.txt"
    bad.write_text(f"# fine\na==1 \\\n    {HASH}\nb==2\n")
    done = subprocess.run(
        [sys.executable, check_no_mirrors.__file__, str(bad)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"{bad}:4: has no hash: 'b==2'" in done.stdout


def test_a_missing_file_is_an_error_and_not_a_pass(tmp_path: Path) -> None:
    assert check_no_mirrors.main([str(tmp_path / "nothing.txt")]) == 2


def test_the_project_itself_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_no_mirrors.main([]) == 0, capsys.readouterr().out


def test_binary_files_are_left_alone(tmp_path: Path) -> None:
    binary = tmp_path / "blob"
    binary.write_bytes(b"\xff\xfe" + INDEXES[0].encode())
    assert check_no_mirrors.problems_in_file(binary) == []
