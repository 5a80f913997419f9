"""The scripts of other projects that the manager's web page ships: fetched, and checked by hash.

They are committed as npm has them, with their licences, so that the page needs no network.
`third_party.json` beside them names each package with its version, the integrity of its archive
(Subresource Integrity, as npm's own lock files have it) and the SHA-256 of every file.

    tools/web_assets.py           check the files that are here
    tools/web_assets.py --fetch   bring them anew from the npm registry; needs npm
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent.parent / "src/vmlab/manager/web/assets"
MANIFEST = "third_party.json"
FOLDER = "third_party"


def packages(assets: Path = ASSETS) -> list[dict[str, Any]]:
    """What is shipped, as the manifest has it."""
    found: list[dict[str, Any]] = json.loads((assets / MANIFEST).read_text("utf-8"))["packages"]
    return found


def problems(assets: Path = ASSETS) -> Iterator[str]:
    """What of the shipped files is not as the manifest says."""
    known = set()
    for package in packages(assets):
        for name, file in package["files"].items():
            known.add(name)
            path = assets / FOLDER / name
            if not path.is_file():
                yield f"{name} of {package['name']} is not there"
            elif hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
                yield f"{name} is not that of {package['name']} {package['version']}"
        if not any(name.endswith(".LICENSE") for name in package["files"]):
            yield f"{package['name']} has no licence beside it"
    for path in sorted((assets / FOLDER).iterdir()):
        if path.name not in known:
            yield f"{path.name} is of no package of {MANIFEST}"


def archive(name: str, version: str, integrity: str, into: Path) -> Path:
    """The package's archive from the npm registry, if it is the one that was meant.

    Raises:
        SystemExit: It has another hash.
    """
    told = subprocess.run(
        ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"],
        cwd=into,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    path = into / told[-1]
    kind, _, expected = integrity.partition("-")
    digest = hashlib.new(kind, path.read_bytes()).digest()
    if base64.b64encode(digest).decode() != expected:
        raise SystemExit(f"{name}@{version}: the archive's {kind} is not {expected}")
    return path


def fetch(assets: Path = ASSETS) -> None:
    """Bring every file of the manifest anew.

    Raises:
        SystemExit: One of them is not what the manifest says.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for package in packages(assets):
            path = archive(package["name"], package["version"], package["integrity"], Path(scratch))
            with tarfile.open(path) as tar:
                for name, file in package["files"].items():
                    member = tar.extractfile(f"package/{file['from']}")
                    if member is None:
                        raise SystemExit(f"{package['name']} has no {file['from']}")
                    data = member.read()
                    if hashlib.sha256(data).hexdigest() != file["sha256"]:
                        raise SystemExit(f"{package['name']}: {file['from']} is another one")
                    (assets / FOLDER / name).write_bytes(data)


def main() -> int:
    """Fetch if asked to, then check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fetch", action="store_true", help="bring the files anew, by npm")
    if parser.parse_args().fetch:
        fetch()
    wrong = list(problems())
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
