"""A laboratory on QEMU for the tests of this folder: its image is booted once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.lab.laboratory import Lab

IMAGE = "debian-12-amd64-tiny"


@pytest.fixture(scope="session")
def image_store() -> Iterator[str]:
    """Where the images are; labs of the tests, and processes that they start, look there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
        yield str(IMAGE_STORE)


@pytest.fixture(scope="session")
def shared_lab(image_store: str) -> Iterator[Lab]:
    need("qemu-system-x86_64")
    with Lab(hypervisor="qemu", image=IMAGE, seed=1) as lab:
        lab.vm(memory="256M", networks=["lan"]).delete()
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """A laboratory with a template; machines of the test are removed after it."""
    before, templates = set(shared_lab.machines), shared_lab.templates["qemu"]
    kept = templates.keys
    yield shared_lab
    for vm in shared_lab.machines:
        if vm not in before:
            vm.delete()
    shared_lab.venue("qemu").loop.run(templates.discard(keep=kept))
