"""Reading a Debian package archive as an ordinary user, on any host.

Not apt: nothing is installed. The chain is apt's: a mirror, an `InRelease` that a known key has
signed, an index whose SHA-256 stands in it, a package whose SHA-256 stands in the index.
"""
