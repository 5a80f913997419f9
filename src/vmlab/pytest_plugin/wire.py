"""How `vmlab test` and the pytest that it has started find each other; imports nothing."""

from __future__ import annotations

from typing import Final

PLUGIN: Final = "vmlab.pytest_plugin.telling"
"""The plugin that tells what pytest does; that it is loaded says that `vmlab test` began it."""

DESCRIPTOR: Final = "VMLAB_TELL_TO"
"""The environment variable with the number of the descriptor to tell on."""

PLUGINS_BEFORE: Final = "VMLAB_PLUGINS_BEFORE"
"""The one with what PYTEST_PLUGINS was before."""

NAME: Final = "vmlab-telling"
"""The name in pytest of what tells."""

SAID: Final = "said"
PROGRESS: Final = "progress"
"""Events: a sentence for whoever waits, and how far the work on an image is."""
