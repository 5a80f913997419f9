"""What the service says of itself is true: schemathesis asks for all that it allows, and more."""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup

load_all_checks()


@schemathesis.serializer("application/x-tar")
def _as_it_is(_: Any, value: Any) -> Any:
    """A tar stream, or what is none."""
    return value if isinstance(value, bytes) else str(value).encode()


_ASKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
_CHECKS = CHECKS.get_by_names(_ASKED)


def _contradictions(url: str, examples: int) -> list[str]:
    """What was answered otherwise than it is described, operation by operation."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=120)
    found = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            _spare_the_host(case.body)
            case.call_and_validate(checks=_CHECKS, timeout=120)

        try:
            ask()
        except FailureGroup as group:
            found += [f"{operation.label}: {failure}" for failure in group.exceptions]
    return found


def _spare_the_host(body: Any) -> None:
    """Bridges and files of this host are other tests' business."""
    if isinstance(body, dict):
        if body.get("mode") == "bridged":
            body["mode"] = "isolated"
        if isinstance(body.get("path"), str):
            body["path"] = "/nowhere/" + body["path"]


def _remove_networks(url: str) -> None:
    """What networks have running on this host ends with the test that made them."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for kind in ("machines", "networks"):
            for item in client.get(f"/v1/{kind}", params={"limit": 1000}).json()["items"]:
                query = {"wait": 100, **({"force": True} if kind == "machines" else {})}
                client.delete(f"/v1/{kind}/{item['id']}", params=query)


def test_every_answer_is_one_that_is_described(url: str) -> None:
    try:
        assert not (found := _contradictions(url, 4)), "\n\n".join(found)
    finally:
        _remove_networks(url)


@pytest.mark.soak
def test_every_answer_is_one_that_is_described_at_length(url: str) -> None:
    examples = int(os.environ.get("VMLAB_SCHEMATHESIS_EXAMPLES", "400"))
    try:
        assert not (found := _contradictions(url, examples)), "\n\n".join(found)
    finally:
        _remove_networks(url)
