"""Images: recipes in, kernels, initramfs and disks out, kept in a content-addressed store.

    from vmlab.images import ImageStore
    image = ImageStore().ensure("debian-13-riscv64-tiny")

Knows nothing of machines that run: a hypervisor is handed the paths in an `Image`.
"""

from __future__ import annotations

from vmlab.images.image import Image
from vmlab.images.progress import Progress, ProgressEvent
from vmlab.images.recipe import Recipe
from vmlab.images.store.store import ImageStore

__all__ = ["Image", "ImageStore", "Progress", "ProgressEvent", "Recipe"]
