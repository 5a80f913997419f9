"""The content-addressed store: fetched files, package indexes and built images.

Everything in it can be deleted and comes back; nothing in it is trusted without its SHA-256.
"""
