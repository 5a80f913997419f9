"""The nouns of vmlab: what a machine is, which states it has, what can be done to it and go wrong.

The lowest floor of the house: it imports nothing of vmlab's, starts no process and opens no file
other than a specification it is asked to read. Import from the module that owns a name
(`from vmlab.machine.spec import MachineSpec`); nothing is re-exported, so that asking for an
error does not import pydantic.
"""
