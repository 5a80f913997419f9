"""The commands of the manager: machines that outlive a command, their disks and their networks.

`connecting` finds the manager, `changing` asks it for changes and shows how they go, `choice` tells
its machines from those that `vmlab run --keep` left; the other modules are commands.
"""
