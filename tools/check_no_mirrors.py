"""Refuse files that name a package index or mirror, or a path of somebody's machine.

vmlab takes its package mirrors from the host's configuration, a setting or the environment; a host
name in the code would bind every user to one. Machine paths are what editors and tools leave
behind in files that everybody reads.

    tools/check_no_mirrors.py [FILE...]      default: every file that git tracks or would add
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Written as patterns of host names, so that this file holds none itself.
_INDEX_HOSTS = re.compile(
    r"""(?xi) (?<![\w-])
    (?: (?:[\w-]+\.)* (?: pypi | pythonhosted | npmjs | crates | rubygems | anaconda )
        \. (?: org | com | io )
    |   (?: deb | ftp(?:\.[\w-]+)* | http(?:redir)? | security | snapshot | archive | ports
        | cdn[\w-]* | cloud | mirrors? )
        \. (?: [\w-]+\. )* (?: debian | ubuntu | kernel | fedoraproject | centos | alpinelinux
        | opensuse | archlinux ) \. (?: org | com | net )
    |   (?: [\w-]+\. )* mirrors? (?: \. [\w-]+ )+ \. (?: org | com | net | edu | cn | de | io )
    ) (?![\w-])"""
)
_INDEX_OPTIONS = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host")
_WORKSPACE_PATHS = re.compile(
    r"(?<![\w.\-/>}])/(?:work|workspaces?|builds|Users|home/runner)/[\w.\-]+"
)
_REQUIREMENT = re.compile(r"^[A-Za-z0-9][\w.\-]*(?:\[[\w,\-]+\])?==")


def machine_paths() -> list[str]:
    """Paths of this very machine that have no business in the project's files."""
    paths = {str(ROOT), sys.base_prefix, str(Path.home()), os.environ.get("VIRTUAL_ENV", "")}
    return sorted(path for path in paths if path.count("/") >= 2)  # "/usr", "/root" are anybody's


def problems_in_text(text: str, *, constraints: bool = False) -> Iterator[tuple[int, str]]:
    """Line numbers and what is wrong there; `constraints` adds the rules of constraints files."""
    paths = machine_paths()
    for number, line in enumerate(text.splitlines(), 1):
        if match := _INDEX_HOSTS.search(line):
            yield number, f"names the package index or mirror {match[0]!r}"
        if match := _WORKSPACE_PATHS.search(line):
            yield number, f"holds the machine path {match[0]!r}"
        for path in paths:
            if re.search(rf"{re.escape(path)}(?![\w.-])", line):
                yield number, f"holds the machine path {path!r}"
        if constraints:
            if match := _INDEX_OPTIONS.search(line):
                yield number, f"chooses an index with {match[0]}"
            if " @ " in line or "://" in line:
                yield number, "takes a package from a URL or a path"
    if constraints:
        yield from _unhashed(text)


def _unhashed(text: str) -> Iterator[tuple[int, str]]:
    """Requirements of a constraints file that are not pinned with a hash."""
    logical = re.sub(r"\\\n", lambda _: "\x00", text).splitlines()
    number = 1
    for entry in logical:
        line = entry.split("\x00")[0].strip()
        if line and not line.startswith(("#", "-")):
            if not _REQUIREMENT.match(line):
                yield number, f"is not pinned to one version: {line!r}"
            if "--hash=sha256:" not in entry:
                yield number, f"has no hash: {line!r}"
        number += 1 + entry.count("\x00")


def project_files() -> list[Path]:
    """Every file that is tracked or could be added, as git sees it."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name]


def problems_in_file(path: Path) -> list[str]:
    """What is wrong with one file, as ``file:line: problem``; nothing for binary files."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError):
        return []  # no text, or deleted while git still lists it
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    constraints = path.name.startswith("constraints") and path.suffix == ".txt"
    return [
        f"{shown}:{number}: {problem}"
        for number, problem in problems_in_text(text, constraints=constraints)
    ]


def main(arguments: list[str]) -> int:
    """Check `arguments`, or the whole project; exit status 1 where something was found."""
    paths = [Path(argument).resolve() for argument in arguments] or project_files()
    if missing := [path for path in paths if arguments and not path.is_file()]:
        print(f"error: no such file: {missing[0]}", file=sys.stderr)
        return 2
    found = [problem for path in paths for problem in problems_in_file(path)]
    for problem in found:
        print(problem)
    if found:
        print(f"{len(found)} found; take mirrors from settings, and paths from where you run")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
