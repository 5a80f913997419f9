"""The hart: its state, the privileged architecture, and what its execution has in common."""
