"""Instruction sets: encodings beside meanings, over an abstract value."""
