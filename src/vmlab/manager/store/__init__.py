"""The manager's store: what is wanted, what is known, and what was done, in a relational database.

`tables` says what is kept, `database` opens it and runs transactions, `queries` reads documents out
of it, `changes` is how states and events are written, `events` tells subscribers what was
committed, `migrations` brings an older store up to date, `backup` saves it and brings it back.
"""
