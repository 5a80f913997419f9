"""Generating native code: a worker process of its own, which alone imports llvmlite."""
