"""The observer: finds where the world is not what the store says, and mends it where it is told to.

`known` is the store at one moment and `seen` the world, both as plain frozen data; `checks` are
pure functions over the two, one for each code of a finding; `collect` does all the looking.
`observer` runs the sweeps, `findings` keeps what they find, `policies` says what is done about it
and `repairs` does it, as operations.
"""
