"""The images that the tests boot: the user's own store, which stays warm from run to run.

It is looked up when this is imported, which is before tests get directories of their own: images
are slow to fetch, and what is in the store never changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmlab.images.settings import default_store

__all__ = ["IMAGE_STORE"]

IMAGE_STORE = Path(os.environ.get("VMLAB_IMAGE_STORE") or default_store(os.environ))
