"""The options of the command line and of the ini file, read and checked.

Light on purpose: it is imported in every project. What has to be known of hypervisors to check a
name is asked where the name is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import pytest

KEEP: Final = ("failed", "always")
SCOPES: Final = ("session", "module", "function")

Keep = Literal["failed", "always"]
Scope = Literal["session", "module", "function"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One option: `--vm-NAME`, and the same in the ini file where that makes sense."""

    name: str
    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None
    many: bool = False
    flag: bool = False
    ini: bool = True

    @property
    def option(self) -> str:
        """As it is written on the command line."""
        return f"--vm-{self.name}"

    @property
    def key(self) -> str:
        """As it is written in the ini file, and where pytest keeps it."""
        return f"vm_{self.name}"


SETTINGS: Final = (
    Setting(
        "hypervisor",
        "Hypervisor that the tests run on; repeatable: they run on each. The embedded engine "
        "where it can, else QEMU, if left out.",
        metavar="NAME",
        many=True,
    ),
    Setting("image", "Image that machines boot; a tiny Debian if left out.", metavar="NAME"),
    Setting(
        "scope",
        "How long the booted template lives that machines are forked from: the whole run, shared "
        "by all workers (session, the default), a module, or not at all (function: each boots).",
        choices=SCOPES,
    ),
    Setting(
        "timeout",
        "Seconds that a test with machines has, its machines' boot included; none if left out.",
        metavar="SECONDS",
    ),
    Setting(
        "seed",
        "What all randomness of the run comes from; made up, and told at the end, if left out.",
        metavar="NUMBER",
        ini=False,
    ),
    Setting(
        "keep",
        "Leave the machines of tests that failed, or of all tests, for `vmlab shell NAME`; each "
        "boots by itself then.",
        choices=KEEP,
        ini=False,
    ),
    Setting(
        "sit",
        "Stop at a failure, with a shell in the guest and a Python prompt that has the fixtures.",
        flag=True,
        ini=False,
    ),
    Setting(
        "rules",
        "TOML or JSON file that says what of a machine's incidents fails a test; all if left out.",
        metavar="FILE",
    ),
    Setting(
        "report",
        "Directory for reports: each run's goes into one of its own there, which `latest` leads "
        "to. The user's state directory if left out.",
        metavar="DIR",
    ),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the options say; None is what they do not.

    Attributes:
        hypervisors: Names of the hypervisors that tests run on; empty where nobody said.
        image: The image that machines boot.
        scope: How long templates live.
        timeout: Seconds for a test with machines.
        seed: Source of all randomness.
        keep: Whose machines stay.
        sit: Whether to stop at a failure.
        rules: The file with the watchdogs' rules, which was read already.
        report: Where reports go.
    """

    hypervisors: tuple[str, ...] = ()
    image: str | None = None
    scope: Scope = "session"
    timeout: float | None = None
    seed: int | None = None
    keep: Keep | None = None
    sit: bool = False
    rules: Path | None = None
    report: Path | None = None


_SETTINGS = pytest.StashKey[Settings]()


def add_to(parser: pytest.Parser) -> None:
    """Tell pytest of the options."""
    group = parser.getgroup("vmlab", "machines (vmlab)")
    for setting in SETTINGS:
        words: dict[str, Any] = {"dest": setting.key, "help": setting.help}
        if setting.flag:
            words |= {"action": "store_true", "default": False}
        else:
            words |= {"action": "append" if setting.many else "store", "default": None}
            words |= {"metavar": setting.metavar} if setting.metavar else {}
            words |= {"choices": setting.choices} if setting.choices else {}
        group.addoption(setting.option, **words)
        if setting.ini:
            kind: Literal["args", "string"] = "args" if setting.many else "string"
            parser.addini(setting.key, f"Default of {setting.option}.", type=kind, default=None)


def any_given(config: pytest.Config) -> bool:
    """Whether the command line or the ini file says anything."""
    return any(_stated(config, setting)[1] for setting in SETTINGS)


def settings_of(config: pytest.Config) -> Settings:
    """What the options of this run say.

    Raises:
        UsageError: one of them cannot be meant; it is named, with what would be right.
    """
    if _SETTINGS not in config.stash:
        config.stash[_SETTINGS] = _read(config)
    return config.stash[_SETTINGS]


def _stated(config: pytest.Config, setting: Setting) -> tuple[str, Any]:
    """Where a setting is stated, in the user's words, and its value; a false one if it is not."""
    value = config.getoption(setting.key)
    if value or not setting.ini:
        return setting.option, value
    value = config.getini(setting.key)
    return setting.key, value if setting.many or not value else str(value).strip()


def _read(config: pytest.Config) -> Settings:
    stated = {setting.name: _stated(config, setting) for setting in SETTINGS}
    for setting in SETTINGS:
        where, value = stated[setting.name]
        if setting.choices and value and value not in setting.choices:
            raise _wrong(where, value, "one of " + ", ".join(map(repr, setting.choices)))
    settings = Settings(
        hypervisors=tuple(dict.fromkeys(stated["hypervisor"][1] or ())),
        image=stated["image"][1] or None,
        scope=cast("Scope", stated["scope"][1] or "session"),
        timeout=_seconds(*stated["timeout"]),
        seed=_seed(*stated["seed"]),
        keep=cast("Keep | None", stated["keep"][1] or None),
        sit=bool(stated["sit"][1]),
        rules=_rules(config, *stated["rules"]),
        report=_directory(config, *stated["report"]),
    )
    _check_hypervisors(stated["hypervisor"][0], settings.hypervisors)
    if settings.sit and config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "--vm-sit with -n: nobody can sit in several workers at once; leave -n out, or say -n 0"
        )
    return settings


def _check_hypervisors(where: str, names: Sequence[str]) -> None:
    if not names:
        return
    from vmlab.hypervisors import registry
    from vmlab.machine.errors import HypervisorUnavailable

    for name in names:
        try:
            provider = registry.provider(name)
        except HypervisorUnavailable as error:
            raise _wrong(where, name, f"{error.message}; {error.hint}") from None
        probe = provider.probe()
        if not probe.available:
            reason = probe.reason or "its probe says no more"
            raise _wrong(where, name, f"it cannot be used here: {reason}; {probe.hint or ''}")


def _seconds(where: str, value: object) -> float | None:
    if not value:
        return None
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise _wrong(where, value, "seconds, as a number greater than 0")
    return seconds


def _seed(where: str, value: object) -> int | None:
    if value is None:
        return None
    text = str(value)
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 63:
        raise _wrong(where, value, "a whole number from 0 to 9223372036854775807")
    return int(text)


def _directory(config: pytest.Config, where: str, value: object) -> Path | None:
    if not value:
        return None
    path = _path(config, where, value)
    if path.exists() and not path.is_dir():
        raise _wrong(where, value, "a directory, or a name that is free for one")
    return path


def _rules(config: pytest.Config, where: str, value: object) -> Path | None:
    if not value:
        return None
    from vmlab.lab.console_rules import Rules
    from vmlab.machine.errors import InvalidSpec

    path = _path(config, where, value)
    try:
        Rules.load(path)
    except InvalidSpec as error:
        raise _wrong(where, value, error.message) from None
    return path


def _path(config: pytest.Config, where: str, value: object) -> Path:
    # On the command line a path is seen from where pytest was started, in a file from the file.
    start = config.invocation_params.dir if where.startswith("-") else config.rootpath
    return start / Path(str(value)).expanduser()


def _wrong(where: str, value: object, right: str) -> pytest.UsageError:
    return pytest.UsageError(f"{where} = {str(value)!r}: {right.rstrip('; ')}")
