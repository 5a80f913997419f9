"""vmlab: define a machine once, boot it on any hypervisor, break it on purpose.

The package's front door holds only the version: importing it costs nothing, and everything else
is imported from the floor it lives on (``vmlab.machine``, ``vmlab.hypervisors``, ...).
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
