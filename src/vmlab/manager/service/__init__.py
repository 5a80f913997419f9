"""The manager as a process: one for each home, in the foreground or in the background.

`serving` is its life, `holding` the lock that makes it one, `listening` the sockets it answers on,
`idle` when a background one may leave, `detaching` how it gets into the background. `python -m
vmlab.manager.service` is the background manager that the client starts.
"""
