"""The manager's web page: what is in the store, live, and every change that can be asked for.

Rendered here and useful without scripts; htmx brings what changed, xterm.js is the console. It
reads by the store's queries and changes by the operator's requests, as every other face does, and
asks for nothing from any network.
"""
