"""Repairs of findings: one for each action of each code, all registered by importing this."""

from vmlab.manager.observer.repairs import disks, guests, leftovers, machines, networks
from vmlab.manager.observer.repairs.repair import REPAIRS, Facts, Repair

__all__ = ["REPAIRS", "Facts", "Repair", "disks", "guests", "leftovers", "machines", "networks"]
