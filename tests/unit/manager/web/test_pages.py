"""What holds for every page: its headers, how times and sizes are told, where one is sent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from starlette.requests import Request

from vmlab.manager.web.machines import anywhere
from vmlab.manager.web.protection import Guard
from vmlab.manager.web.rendering import _following, _moment, _span, headers
from vmlab.manager.web.session import _inside
from vmlab.manager.web.visit import login_address


def test_no_page_may_run_or_show_what_is_not_its_own() -> None:
    policy = headers()["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    with_styles = headers(style_nonce="abc")["Content-Security-Policy"]
    assert "style-src 'self' 'nonce-abc';" in with_styles
    assert "script-src 'self';" in with_styles


@pytest.mark.parametrize(
    "span, words",
    [(0.416, "0.42 s"), (185, "3 min 5 s"), (timedelta(hours=2, minutes=10), "2 h 10 min")],
)
def test_spans_are_told_as_people_read_them(span: float | timedelta, words: str) -> None:
    assert _span(span) == words


def test_times_are_utc() -> None:
    assert _moment(datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)) == "2026-05-04 03:02:01 UTC"


def test_the_next_page_keeps_what_is_filtered() -> None:
    filters = {"name": "a&b", "state": None, "cursor": "old"}
    assert _following(filters, "new") == "name=a%26b&cursor=new"
    assert _following({"cursor": None}, "new") == "cursor=new"


@pytest.mark.parametrize(
    "text, pattern", [(None, None), ("web", "*web*"), ("web-?", "web-?"), ("w*", "w*")]
)
def test_names_are_looked_for_anywhere_in_them(text: str | None, pattern: str | None) -> None:
    assert anywhere(text) == pattern


@pytest.mark.parametrize(
    "address, to",
    [
        ("/ui/disks", "/ui/disks"),
        ("/ui/disks?name=a", "/ui/disks"),
        ("//evil.example/ui/", "/ui/machines"),
        ("https://evil.example/ui/", "/ui/machines"),
        ("/ui/\\evil.example", "/ui/machines"),
        ("/v1/machines", "/ui/machines"),
        ("", "/ui/machines"),
    ],
)
def test_who_logs_in_goes_on_here_and_nowhere_else(address: str, to: str) -> None:
    assert _inside(address) == to


def test_who_has_to_log_in_comes_back_to_where_they_were() -> None:
    assert login_address("/ui/machines/web 1") == "/ui/login?next=/ui/machines/web%201"
    assert login_address("/elsewhere") == "/ui/login?next=/ui/machines"


def test_a_form_is_of_the_token_of_its_page() -> None:
    def shown(token: str | None) -> Request:
        cookies = [] if token is None else [(b"cookie", f"vmlab-token={token}".encode())]
        return Request({"type": "http", "method": "POST", "headers": cookies})

    guard, other = Guard(), Guard()
    word = guard.word(shown("a"))
    guard.refuse_other_words(shown("a"), word)
    guard.refuse_other_words(shown(None), "")
    for token, said in (("b", word), ("a", ""), ("a", other.word(shown("a"))), ("a", "é")):
        with pytest.raises(Exception, match="another session"):
            guard.refuse_other_words(shown(token), said)
