"""The manager: machines, disks and networks that outlive a command, and how they ought to be.

`requests` and `documents` are what goes in and comes out; `store` keeps it, `operator` changes the
world, `observer` compares the two, `networks` wires machines together, `api` and `web` are the
faces, `client` speaks to them.
"""
