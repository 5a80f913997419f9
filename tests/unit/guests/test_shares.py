"""What `--share` is told: a directory, its place, and how it gets there."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.guests.shares import parse_share
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.spec import ShareKind


def test_a_share_is_read_only_and_finds_its_own_way_unless_it_says_else() -> None:
    share = parse_share(".:/src", "tag")
    assert (share.source, share.target) == (Path.cwd(), "/src")
    assert (share.readonly, share.kind) == (True, ShareKind.AUTO)
    share = parse_share("/a:/b:rw:9p", "tag")
    assert (share.readonly, share.kind) == (False, ShareKind.P9)
    assert parse_share("/a:/b:copy:ro", "tag").kind is ShareKind.COPY


@pytest.mark.parametrize("text", ["", "/a", "/a:", "/a:relative", ":/b", "/a:/b:fast"])
def test_what_is_no_share_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"\.:/src"):
        parse_share(text, "tag")
