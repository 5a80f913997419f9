"""Readers and writers of the file formats that images are made of and come in.

Each module knows one format and nothing of distributions or stores. Input is never trusted:
whatever is wrong with it ends in a `FormatError` that names the file.
"""
