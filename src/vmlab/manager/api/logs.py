"""The manager's log: a line of JSON for each thing that happens, with request and operation ids.

What is secret is not written, whoever hands it over: keys that hold a secret by their name are
blanked, and paths are logged without their queries.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import MutableMapping
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Final

import structlog

__all__ = ["BLANKED", "configure", "logger"]

BLANKED: Final = "[not logged]"

_SECRET: Final = re.compile(
    r"token$|secret|password|passwd|authorization|cookie|private_?key|user_?data|ssh_?keys", re.I
)
_SECRET_VALUE: Final = re.compile(r"vml_[A-Za-z0-9_-]{20,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
"""A token of the manager's, and the name and password of a URL."""


def blank_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank what is secret in a line of the log, however deep it stands; structlog calls it."""
    return {name: _blanked(name, value) for name, value in event.items()}


def _blanked(name: str, value: Any) -> Any:
    if _SECRET.search(name) and value is not None:
        return BLANKED
    if isinstance(value, dict):
        return {key: _blanked(str(key), part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_blanked("", part) for part in value]
    return _SECRET_VALUE.sub(BLANKED, value) if isinstance(value, str) else value


def logger(part: str) -> structlog.stdlib.BoundLogger:
    """The logger of a part of the manager, such as "api"."""
    made: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(f"vmlab.manager.{part}")
    return made


def configure(file: Path | None = None, level: str = "INFO") -> None:
    """Write what the manager logs, and the warnings of its libraries, from now on.

    Args:
        file: Where to, for its user alone; None is stderr. It may be moved away (logrotate(8)).
        level: The least that is written: "DEBUG", "INFO", "WARNING" or "ERROR".
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler()
    else:
        file.touch(mode=0o600)
        handler = WatchedFileHandler(file, encoding="utf-8")
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                blank_secrets,
                structlog.processors.JSONRenderer(serializer=json.dumps, default=str),
            ],
        )
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *before,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("vmlab").setLevel(level)
