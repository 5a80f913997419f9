"""The lab: machines made ready for use, and commands run in them.

Knows hypervisors by their contract, images by their store and guests by their channels; how a
result is shown is the command line's business.
"""
