"""Pages of long lists: where one ends and the next begins, as a text that a client hands back.

Keyset pagination: a cursor holds the sort key of the last item, so that a page is found by an index
however far it is, and items that come or go meanwhile neither hide others nor show them twice.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel
from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import LARGEST
from vmlab.manager.documents import Page
from vmlab.manager.store.words import is_text

__all__ = ["LARGEST_PAGE", "refuse", "take_page", "text"]

LARGEST_PAGE: Final = 1_000
"""Items of the largest page."""

Row = TypeVar("Row")
Document = TypeVar("Document", bound=BaseModel)


def take_page(
    s: Session,
    query: Select[Row],
    *,
    key: Sequence[InstrumentedAttribute[Any]],
    document: Callable[[Session, Sequence[Row]], Sequence[Document]],
    limit: int,
    cursor: str | None,
    descending: bool = False,
    count: bool = False,
) -> Page[Document]:
    """A page of what `query` finds, in the order of `key`, which is unique.

    Args:
        s: The session.
        query: What is listed, without an order: rows, or columns of which `key` are some.
        key: The columns that it is ordered by, all in the same direction.
        document: Makes documents of the rows of a page, all at once.
        limit: How many at most.
        cursor: `Page.next` of the page before.
        descending: The other way round.
        count: Count all that `query` finds, too: that takes a look at each.

    Raises:
        InvalidSpec: `limit` or `cursor` are none.
    """
    if not 1 <= limit <= LARGEST_PAGE:
        raise refuse("limit", limit, f"1 to {LARGEST_PAGE}")
    total = s.scalar(select(func.count()).select_from(query.subquery())) if count else None
    if cursor is not None:
        values = _values(cursor, key)
        here, there = (key[0], values[0]) if len(key) == 1 else (tuple_(*key), tuple_(*values))
        query = query.where(here < there if descending else here > there)
    order = [column.desc() if descending else column.asc() for column in key]
    query = query.order_by(*order).limit(limit + 1)
    rows: Sequence[Any] = (
        s.scalars(query).all() if len(query.column_descriptions) == 1 else s.execute(query).all()
    )
    following = None
    if len(rows) > limit:
        rows = rows[:limit]
        following = _cursor([getattr(rows[-1], column.key) for column in key])
    return Page(items=tuple(document(s, rows)), next=following, total=total)


def refuse(field: str, value: object, expected: str) -> InvalidSpec:
    """The error for an argument of a list that is none."""
    return InvalidSpec([SpecProblem(field, value, expected)], what="query", operation="list")


def text(field: str, value: str) -> str:
    """`value`, if a database can have it.

    Raises:
        InvalidSpec: it cannot, naming the field.
    """
    if not is_text(value):
        raise refuse(field, value, "text without NUL and lone surrogates")
    return value


def _cursor(values: Sequence[Any]) -> str:
    plain = [value.isoformat() if isinstance(value, datetime) else value for value in values]
    return base64.urlsafe_b64encode(json.dumps(plain).encode()).decode().rstrip("=")


def _values(cursor: str, key: Sequence[InstrumentedAttribute[Any]]) -> list[Any]:
    """What a cursor holds: a value of each column's type."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        plain = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if not isinstance(plain, list) or len(plain) != len(key):
            raise ValueError
        kinds = [column.type.python_type for column in key]
        return [_typed(value, kind) for value, kind in zip(plain, kinds, strict=True)]
    except (ValueError, OverflowError, binascii.Error, RecursionError):
        raise refuse("cursor", cursor, "what `next` of the page before said") from None


def _typed(value: Any, kind: type) -> Any:
    if kind is datetime and isinstance(value, str):
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
        return moment.astimezone(UTC)
    if type(value) is not kind or (isinstance(value, int) and abs(value) > LARGEST):
        raise ValueError
    if isinstance(value, str) and not is_text(value):
        raise ValueError
    return value
