"""The observer's eyes: what the store, hypervisors, processes, files, networks and guests show.

Each module looks at one thing and returns plain data of `known` or `seen`; none of them judges,
and none changes anything.
"""
