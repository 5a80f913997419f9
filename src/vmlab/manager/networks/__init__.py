"""Networks that machines of the manager's are on: addresses, wires, DHCP, NAT, VLANs, metadata.

`networks.Networks` is what the rest of the manager talks to. `ipam` and `addresses` say who has
which address; `layout` says what a network needs of the host, and `host` makes and removes that.
"""
