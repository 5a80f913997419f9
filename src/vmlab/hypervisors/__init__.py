"""Hypervisors: the contract (`base`), what all back ends share
(`hooks`, `serialised_machine`, `operated_machine`, `operated_hypervisor`), and the back ends.

Knows nothing of images, guests' distributions, databases or pytest.
"""
