"""The checks, one module for each topic of the contract."""
