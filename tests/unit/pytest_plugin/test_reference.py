"""The reference page of the plugin is made from the plugin, and leaves nothing out."""

from __future__ import annotations

import docs_hooks
import pytest

from vmlab.pytest_plugin import marks, options, plugin


def test_every_fixture_argument_and_option_is_on_the_page() -> None:
    page = docs_hooks.pytest_page()
    fixtures = [
        name for name in vars(plugin) if f"| `{name}` | " in page and not name.startswith("pytest_")
    ]
    assert {"vm", "vm_off", "vms", "vm_factory", "disk_factory", "network_factory"} <= {*fixtures}
    for name in marks.ARGUMENTS:
        assert f"| `{name}` |" in page
        assert f"{name}=" in plugin.MARK
    for setting in options.SETTINGS:
        assert f"| `{setting.option}` |" in page


def test_the_page_is_not_made_while_an_argument_has_no_meaning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(marks, "MEANINGS", {})
    with pytest.raises(RuntimeError, match="image"):
        docs_hooks.pytest_page()
