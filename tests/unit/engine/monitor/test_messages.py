"""Messages come whole out of a stream, however it is cut, and whatever stands between them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.engine.monitor.messages import DEEPEST, LONGEST, Malformed, MessageReader, written

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=4)


@given(st.lists(OBJECTS, max_size=5), st.sampled_from([b"", b"\n", b" \r\n\t"]), st.data())
def test_messages_come_out_however_the_stream_is_cut(
    messages: list[dict[str, Any]], between: bytes, data: st.DataObject
) -> None:
    stream = between.join(json.dumps(message).encode() for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = MessageReader()
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[begin:end])
    assert found == messages


@given(st.binary(max_size=200))
def test_whatever_comes_reading_goes_on_after_it(noise: bytes) -> None:
    reader = MessageReader()
    reader.feed(noise)
    assert reader.feed(b'\xff{"execute": "quit"}') == [{"execute": "quit"}]


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"hello\n", "expecting value"),
        (b"[1]\n", "must be a JSON object"),
        (b"{'execute': 1}\n", "JSON parse error"),
        (b'{"a": \x80}\n', "JSON parse error"),
        (b"{]\n", "JSON parse error"),
    ],
)
def test_what_is_no_message_is_told_once(stream: bytes, reason: str) -> None:
    reader = MessageReader()
    (told, message) = reader.feed(stream + b'{"ok": true}')
    assert isinstance(told, Malformed)
    assert reason in told.reason
    assert message == {"ok": True}


def test_too_deep_and_too_long_are_refused() -> None:
    reader = MessageReader()
    (told,) = reader.feed(b'{"a":' * (DEEPEST + 1))
    assert told == Malformed(f"JSON parse error, nested more than {DEEPEST} deep")
    reader = MessageReader()
    (told,) = reader.feed(b'{"a": "' + b"x" * LONGEST)
    assert told == Malformed(f"JSON parse error, a message longer than {LONGEST} bytes")
    assert reader.feed(b'"}\n{}') == [{}]


def test_brackets_in_strings_are_text() -> None:
    message = {"a": '}{]["\\'}
    assert MessageReader().feed(written(message)) == [message]
