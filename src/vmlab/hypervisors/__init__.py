"""Hypervisors: the contract (`base`), what all back ends share (`operations`), and the back ends.

Knows nothing of images, guests' distributions, databases or pytest.
"""
