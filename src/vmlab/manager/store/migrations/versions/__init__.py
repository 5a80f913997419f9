"""Versions of the schema, one module each, in the order of their numbers.

A version is never changed once it was released: stores have been brought to it. It knows nothing of
`tables`, which is what the newest version is; types and constraints are spelled out.
"""
