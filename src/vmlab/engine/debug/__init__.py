"""Watching a guest: what a debugger sees of it, the GDB stub, symbols, traces."""
