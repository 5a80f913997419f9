"""The engine's monitor: QMP over unix sockets, as QEMU speaks it (docs/interop/qmp-spec)."""
