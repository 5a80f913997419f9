"""All kinds of requests that can be carried out: importing this registers them."""

from vmlab.manager.operator import (
    creation,
    lifecycle,
)

__all__ = ["creation", "lifecycle"]
