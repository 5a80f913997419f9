"""What the host's apt is configured to use: mirrors, proxies, and whether dates are checked.

Read, never changed. Follows apt.conf(5), sources.list(5) and apt-transport-http(1); the settings
themselves are merged by `apt-config dump`, so that they are what apt sees. A host without apt has
an empty configuration.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vmlab.images.errors import FormatError
from vmlab.images.formats.control import paragraphs

_SETTING = re.compile(r'^(?P<name>[^\s"]+) "(?P<value>(?:[^"\\]|\\.)*)";$')
_ENTRY = re.compile(r"^deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>.*)$")
_SECONDS_FOR_APT = 10


@dataclass(frozen=True)
class Source:
    """One archive that apt may install from, and the file that says so."""

    uri: str
    suite: str
    components: tuple[str, ...]
    file: Path


@dataclass(frozen=True)
class AptConfiguration:
    """apt's merged settings (names in lower case) and the archives it uses, in its order."""

    settings: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()

    def flag(self, name: str, default: bool) -> bool:
        """A boolean setting, apt.conf(5)."""
        value = self.settings.get(name.lower(), "").lower()
        if value in ("1", "yes", "true", "with", "on", "enable"):
            return True
        if value in ("0", "no", "false", "without", "off", "disable"):
            return False
        return default

    def proxy(self, url: str) -> str | None:
        """The proxy that apt uses for `url`: "DIRECT" for none, None where apt does not say."""
        parts = urlsplit(url)
        base = f"acquire::{parts.scheme}::proxy"
        for name in (f"{base}::{parts.hostname}", base):
            value = self.settings.get(name)
            if value:
                return "DIRECT" if value.upper() in ("DIRECT", "FALSE") else value
        for name in (f"{base}-auto-detect", f"acquire::{parts.scheme}::proxyautodetect"):
            command = self.settings.get(name)
            if command:
                return _detected(command, url)
        return None


@functools.cache
def host_configuration() -> AptConfiguration:
    """The configuration of this host's apt; empty where there is no apt, or it fails."""
    program = shutil.which("apt-config")
    if program is None:
        return AptConfiguration()
    try:
        dump = subprocess.run(
            [program, "dump"], capture_output=True, text=True, check=True,
            timeout=_SECONDS_FOR_APT, stdin=subprocess.DEVNULL, errors="replace",
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return AptConfiguration()
    settings = parse_settings(dump)
    return AptConfiguration(settings, tuple(_sources(settings)))


def parse_settings(dump: str) -> dict[str, str]:
    """The settings in the output of `apt-config dump`, names in lower case."""
    settings: dict[str, str] = {}
    for line in dump.splitlines():
        match = _SETTING.match(line.strip())
        if match is not None:
            settings[match["name"].lower()] = match["value"].replace('\\"', '"')
    return settings


def _sources(settings: Mapping[str, str]) -> Iterator[Source]:
    etc = Path(settings.get("dir", "/")) / settings.get("dir::etc", "etc/apt")
    files = [etc / settings.get("dir::etc::sourcelist", "sources.list")]
    parts = etc / settings.get("dir::etc::sourceparts", "sources.list.d")
    if parts.is_dir():
        files += sorted(path for path in parts.iterdir() if path.suffix in (".list", ".sources"))
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # apt itself reports it; another file may still name a mirror
        yield from parse_sources(text, file)


def parse_sources(text: str, file: Path) -> Iterator[Source]:
    """The binary archives that a `.list` or `.sources` file names.

    What is malformed or disabled is left out: complaining about it is apt's business. A
    `mirror+file:` archive stands for the mirrors that its file lists.
    """
    found = _deb822_sources(text, file) if file.suffix == ".sources" else _list_sources(text, file)
    for source in found:
        if source.uri.startswith("mirror+file:"):
            for uri in _listed_mirrors(Path(urlsplit(source.uri).path)):
                yield Source(uri, source.suite, source.components, file)
        else:
            yield source


def _list_sources(text: str, file: Path) -> Iterator[Source]:
    for line in text.splitlines():
        match = _ENTRY.match(line.split("#", 1)[0].strip())
        if match is not None:
            components = tuple(match["components"].split())
            yield Source(match["uri"], match["suite"], components, file)


def _deb822_sources(text: str, file: Path) -> Iterator[Source]:
    try:
        stanzas = list(paragraphs(text, source=str(file)))
    except FormatError:
        return
    for stanza in stanzas:
        fields = {name.lower(): value for name, value in stanza.items()}
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, tuple(fields.get("components", "").split()), file)


def _listed_mirrors(file: Path) -> list[str]:
    """The mirrors in a list for apt-transport-mirror(1): one a line, options behind a tab."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    stripped = (line.split("#", 1)[0].split() for line in lines)
    return [words[0] for words in stripped if words]


def _detected(command: str, url: str) -> str | None:
    """What the host's proxy detector answers for `url`, apt.conf(5) `Proxy-Auto-Detect`."""
    try:
        answer = subprocess.run(
            [command, url], capture_output=True, text=True, check=True,
            timeout=_SECONDS_FOR_APT, stdin=subprocess.DEVNULL, errors="replace",
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return "DIRECT" if answer.upper() == "DIRECT" else answer or None
