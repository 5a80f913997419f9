"""The devices of the board, in Python, behind a bus that a fault schedule can wrap.

No device knows how instructions are executed: interrupts leave as calls of a line, time comes from
a clock, work that may block goes to workers, and guest memory is reached through `Ram` alone.
"""
