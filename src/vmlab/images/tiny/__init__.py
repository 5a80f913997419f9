"""Tiny images: a kernel and an initramfs with busybox, put together in pure Python.

Not a root file system on a disk: those are in `vmlab.images.roots`. What runs in the guest is
`init.sh` beside this file.
"""
