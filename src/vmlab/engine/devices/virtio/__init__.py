"""Virtio 1.2 devices over virtio-mmio."""
