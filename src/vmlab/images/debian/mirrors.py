"""Which mirror a suite is fetched from, and through which proxy. No host stands in this code.

In order: the setting, `VMLAB_DEBIAN_MIRROR`, the archives that the host's apt uses for Debian.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from vmlab.images.debian.apt import AptConfiguration
from vmlab.images.errors import MirrorError

VARIABLE = "VMLAB_DEBIAN_MIRROR"
_SCHEMES = ("http", "https", "file", "copy")
_CODENAMES = ("bullseye", "bookworm", "trixie", "forky", "duke", "sid")
_CLASSES = ("stable", "testing", "unstable", "oldstable", "oldoldstable", "experimental")


@dataclass(frozen=True)
class Mirror:
    """An archive's base URL, without a slash at its end, and where it was found."""

    url: str
    origin: str

    @property
    def shown(self) -> str:
        """The URL for a person: without the password that it may hold."""
        return without_password(self.url)


def without_password(url: str) -> str:
    """`url` as it may be shown and logged."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.hostname or ""
    place = f"{host}:{parts.port}" if parts.port else host
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{place}"))


def mirrors(
    suite: str,
    *,
    setting: str | None,
    environment: Mapping[str, str],
    apt: AptConfiguration,
) -> list[Mirror]:
    """The mirrors to try for a Debian suite, the best first.

    Raises:
        MirrorError: there is none, or one that was given is not a URL that can be fetched.
    """
    for url, origin in ((setting, "setting"), (environment.get(VARIABLE), VARIABLE)):
        if url:
            return [_given(url, origin)]
    found = [
        Mirror(_plain(source.uri), f"apt: {source.file}")
        for source in sorted(apt.sources, key=lambda source: source.suite != suite)
        if _is_debian(source.suite, source.components) and _scheme(source.uri) in _SCHEMES
    ]
    unique = {mirror.url: mirror for mirror in reversed(found)}
    if not unique:
        raise MirrorError(
            f"there is no mirror to fetch Debian's {suite!r} from: this host's apt names none",
            hint=f"set {VARIABLE} to a mirror's URL (the part before /dists), or give it in the "
            "configuration file as images.debian_mirror",
        )
    return sorted(unique.values(), key=found.index)


def _given(url: str, origin: str) -> Mirror:
    if _scheme(url) not in _SCHEMES or not (urlsplit(url).netloc or _scheme(url) == "file"):
        raise MirrorError(
            f"{origin} = {without_password(url)!r} is not a mirror's URL",
            hint="an http:, https: or file: URL, the part before /dists",
        )
    return Mirror(_plain(url), origin)


def _scheme(url: str) -> str:
    try:
        return urlsplit(url).scheme
    except ValueError:
        return ""


def _plain(url: str) -> str:
    return ("file:" + url.removeprefix("copy:") if url.startswith("copy:") else url).rstrip("/")


def _is_debian(suite: str, components: tuple[str, ...]) -> bool:
    """Whether an archive that apt uses is a mirror of Debian's main archive.

    By its suites, since the host names of mirrors tell nothing; a wrong guess is refused when
    the signature is checked. The security archive is another archive, with other suites.
    """
    base, _, rest = suite.partition("-")
    pocket = rest in ("", "updates", "backports", "proposed-updates")
    return "main" in components and pocket and base in (*_CODENAMES, *_CLASSES)


def proxy_for(url: str, *, apt: AptConfiguration) -> str | None:
    """The proxy to fetch `url` through, or None: apt's, else that of the environment.

    Raises:
        MirrorError: the proxy is of a kind that cannot be used.
    """
    scheme = _scheme(url)
    if scheme not in ("http", "https"):
        return None
    host = urlsplit(url).hostname or ""
    proxy = apt.proxy(url)
    if proxy is None and not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies_environment().get(scheme)
    if proxy is None or proxy == "DIRECT":
        return None
    if _scheme(proxy) not in ("http", "https"):
        raise MirrorError(
            f"the proxy {without_password(proxy)!r} for {host} is neither http nor https",
            hint="give an http proxy in apt's configuration or in http_proxy",
        )
    return proxy
