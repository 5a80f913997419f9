"""What hypervisors share whose machines are processes that speak QMP: QEMU and the embedded engine.

The life of such a machine is told here once. A back end adds what its program is started with, and
what that program can do beyond living.
"""
