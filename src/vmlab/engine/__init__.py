"""The embedded machine: an emulated computer whose native code is generated from Python."""
