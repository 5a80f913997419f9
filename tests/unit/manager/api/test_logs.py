"""What the manager's log has, and what it must not have."""

from __future__ import annotations

import pytest

from vmlab.manager.api.logs import BLANKED, blank_secrets


@pytest.mark.parametrize(
    "name", ["token", "secret", "password", "Authorization", "cookie", "user_data", "ssh_keys"]
)
def test_what_is_secret_by_its_name_is_blanked_however_deep(name: str) -> None:
    told = blank_secrets(None, "info", {"event": "x", name: "s", "in": [{name: ["s"], "b": 1}]})
    assert told == {"event": "x", name: BLANKED, "in": [{name: BLANKED, "b": 1}]}


def test_tokens_and_passwords_in_texts_are_blanked() -> None:
    text = "vml_" + "a" * 43
    told = blank_secrets(None, "info", {"event": f"got {text} from postgresql://me:pw@host/x"})
    assert told == {"event": f"got {BLANKED} from postgresql://{BLANKED}@host/x"}


def test_what_is_no_secret_stays() -> None:
    event = {"event": "request", "path": "/v1/tokens", "status": 200, "token_count": 3, "a": None}
    assert blank_secrets(None, "info", dict(event)) == event
