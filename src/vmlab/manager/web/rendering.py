"""Templates into pages: everything that is shown is escaped, whatever a guest or a person wrote.

As in the report (`vmlab.report.html`), control characters are written out, and nothing inline may
run: the Content-Security-Policy allows the page's own files, and nothing else (CSP level 3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from vmlab.machine.sizes import format_size, rounded_size
from vmlab.manager.web.assets import asset_url
from vmlab.report.drawing import number
from vmlab.report.escape import escape_controls

if TYPE_CHECKING:
    import jinja2

__all__ = ["REGION", "headers", "render"]

REGION: Final = "region"
"""The block of a page that is brought anew when something changed."""

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def headers(*, style_nonce: str | None = None) -> dict[str, str]:
    """What every page is sent with.

    Args:
        style_nonce: Of style sheets that a script of the page makes (xterm.js does); none may be
            made without one.
    """
    styles = "" if style_nonce is None else f" 'nonce-{style_nonce}'"
    return {
        "Content-Security-Policy": _POLICY.format(styles=styles),
        "Cache-Control": "no-store",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        # Not "no-referrer": a form would then be sent with the origin "null".
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Vary": "HX-Request",
    }


def render(template: str, context: Mapping[str, Any], *, block: str | None = None) -> str:
    """A template as HTML, or one block of it alone.

    Args:
        template: Its name, without the ending.
        context: What it tells.
        block: Name of the block; the whole page if None.
    """
    found = _environment().get_template(f"{template}.html.jinja")
    if block is None:
        return found.render(context)
    return "".join(found.blocks[block](found.new_context(dict(context))))


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    folder = files("vmlab.manager.web").joinpath("templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        auto_reload=False,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Every text of every expression: nothing in a template can forget it.
        finalize=lambda value: escape_controls(value) if type(value) is str else value,
    )
    environment.filters.update(
        size=format_size,
        rounded=rounded_size,
        number=number,
        moment=_moment,
        iso=lambda moment: moment.astimezone(UTC).isoformat(),
        span=_span,
        without_cursor=_first,
        with_cursor=_following,
        data=lambda value: json.dumps(value, indent=1, ensure_ascii=False, default=str),
    )
    environment.globals.update(asset=asset_url)
    # In the blocks of a page, too, that are rendered alone.
    environment.globals["parts"] = environment.get_template("parts.html.jinja").module
    return environment


def _first(filters: Mapping[str, str | None]) -> str:
    """The query of the first page of a list that is filtered so."""
    return urlencode({name: value for name, value in filters.items() if value and name != "cursor"})


def _following(filters: Mapping[str, str | None], cursor: str) -> str:
    """The query of another page of it."""
    return "&".join(filter(None, (_first(filters), urlencode({"cursor": cursor}))))


def _moment(moment: datetime) -> str:
    """A time as people read it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _span(span: timedelta | float) -> str:
    """A time that passed, as people read it: "0.42 s", "3 min 5 s", "2 h 10 min"."""
    seconds = span.total_seconds() if isinstance(span, timedelta) else span
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
