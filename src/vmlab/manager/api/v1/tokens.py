"""`/v1/tokens`: who may ask, as far as tokens go; only a token of the scope `admin` gets here."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from vmlab.manager.api import security
from vmlab.manager.api.problems import documented
from vmlab.manager.api.security import IssuedToken, NewToken, TokenDocument
from vmlab.manager.api.service import Here, told
from vmlab.manager.documents import Page

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["tokens"])


@router.get("/tokens", response_model=Page[TokenDocument], responses=documented())
async def list_tokens(here: Here) -> Response:
    """The tokens that were not revoked, without what is secret about them."""
    tokens = await here.manager.database.read(security.list_tokens)
    return told(Page[TokenDocument](items=tuple(tokens), total=len(tokens)))


@router.post("/tokens", status_code=201, response_model=IssuedToken, responses=documented(409))
async def create_token(here: Here, body: NewToken) -> Response:
    """Make a token; it is told this once."""
    made = await here.manager.database.write(security.issue, body)
    return told(made, status=201, headers={"Location": f"/v1/tokens/{made.id}"})


@router.delete("/tokens/{token}", status_code=204, response_model=None, responses=documented(404))
async def revoke_token(here: Here, token: str) -> Response:
    """Have a token be good for nothing from now on; `token` is its id."""
    await here.manager.database.write(security.revoke, token)
    if here.authenticator is not None:
        here.authenticator.forget()
    return Response(status_code=204)
