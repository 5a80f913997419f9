"""Guests: talking to what runs inside a machine.

One interface (`guest.Guest`) over four channels: vmlab's own agent, the QEMU guest agent, SSH, and
a login on the serial console. Knows machines by the contract of `vmlab.hypervisors.base` only.
"""
