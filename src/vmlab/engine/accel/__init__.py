"""Who executes the guest."""
