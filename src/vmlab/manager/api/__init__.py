"""The manager's service: REST under `/v1`, events, consoles, metrics, and VMAN's routes.

Not a place for decisions: what may be done is the operator's to say. Routes translate: a request
into one of `vmlab.manager.requests`, a document or an error into HTTP (RFC 9110).
"""

from vmlab.manager.api.app import create_app, end_streams
from vmlab.manager.api.limits import Limits

__all__ = ["Limits", "create_app", "end_streams"]
