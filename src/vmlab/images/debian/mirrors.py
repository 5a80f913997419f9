"""Which mirror a suite is fetched from, and through which proxy. No host stands in this code.

In order: the setting, `VMLAB_DEBIAN_MIRROR`, the archives that the host's apt uses for Debian.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from vmlab.images.debian.apt import AptConfiguration
from vmlab.images.errors import MirrorError

VARIABLE = "VMLAB_DEBIAN_MIRROR"
SECURITY_VARIABLE = "VMLAB_DEBIAN_SECURITY_MIRROR"
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


@dataclass(frozen=True)
class Given:
    """The mirrors that settings name: of the archive, and of the security archive."""

    archive: str | None = None
    security: str | None = None


def mirrors(
    suite: str,
    *,
    setting: Given,
    environment: Mapping[str, str],
    apt: AptConfiguration,
) -> list[Mirror]:
    """The mirrors to try for a Debian suite or pocket, the best first.

    Raises:
        MirrorError: there is none, or one that was given is not a URL that can be fetched.
    """
    if is_security(suite):
        found = _security(suite, setting=setting, environment=environment, apt=apt)
        if found:
            return found
        raise MirrorError(
            f"there is no mirror to fetch Debian's {suite!r} from: this host's apt names none",
            hint=f"set {SECURITY_VARIABLE} to the URL of a mirror of the security archive, or "
            "leave it out with images.pockets",
        )
    given = _first_given((setting.archive, "setting"), (environment.get(VARIABLE), VARIABLE))
    if given is not None:
        return [given]
    found = _of_apt(suite, apt, _is_debian)
    if not found:
        raise MirrorError(
            f"there is no mirror to fetch Debian's {suite!r} from: this host's apt names none",
            hint=f"set {VARIABLE} to a mirror's URL (the part before /dists), or give it in the "
            "configuration file as images.debian_mirror",
        )
    return found


def pockets(
    suite: str,
    *,
    wanted: Sequence[str] | None,
    setting: Given,
    environment: Mapping[str, str],
    apt: AptConfiguration,
) -> list[str]:
    """The names of a suite's pockets to read besides: "bookworm-updates", "bookworm-security".

    Args:
        suite: The suite or codename.
        wanted: Their kinds, "updates" and "security"; None for what the host's apt uses of any
            suite of Debian's, or for what the mirrors that were given can have.
        setting: The mirrors that settings name.
        environment: Names others.
        apt: The host's apt configuration.
    """
    if wanted is not None:
        return [f"{suite}-{kind}" for kind in wanted]
    found = []
    given = setting.archive or environment.get(VARIABLE)
    updates = any(
        _is_debian(source.suite, source.components) and source.suite.endswith("-updates")
        for source in apt.sources
    )
    if given or updates:
        found.append(f"{suite}-updates")
    security = f"{suite}-security"
    if _security(security, setting=setting, environment=environment, apt=apt):
        found.append(security)
    return found


def _security(
    suite: str, *, setting: Given, environment: Mapping[str, str], apt: AptConfiguration
) -> list[Mirror]:
    given = _first_given(
        (setting.security, "setting"), (environment.get(SECURITY_VARIABLE), SECURITY_VARIABLE)
    )
    if given is not None:
        return [given]
    if setting.archive or environment.get(VARIABLE):
        return []  # whoever names a mirror wants nothing from elsewhere
    return _of_apt(suite, apt, _is_debian_security)


def _first_given(*candidates: tuple[str | None, str]) -> Mirror | None:
    return next((_given(url, origin) for url, origin in candidates if url), None)


def _of_apt(
    suite: str, apt: AptConfiguration, right: Callable[[str, tuple[str, ...]], bool]
) -> list[Mirror]:
    """The archives of the right kind that apt uses, those of the same suite first; each once."""
    found = [
        Mirror(_plain(source.uri), f"apt: {source.file}")
        for source in sorted(apt.sources, key=lambda source: source.suite != suite)
        if right(source.suite, source.components) and _scheme(source.uri) in _SCHEMES
    ]
    unique = {mirror.url: mirror for mirror in reversed(found)}
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


def is_security(suite: str) -> bool:
    """Whether a suite is of the security archive, by its name."""
    return suite.endswith("-security")


def _is_debian_security(suite: str, components: tuple[str, ...]) -> bool:
    """Whether an archive that apt uses is a mirror of Debian's security archive."""
    base = suite.removesuffix("-security")
    return is_security(suite) and "main" in components and base in (*_CODENAMES, *_CLASSES)


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
