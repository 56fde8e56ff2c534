"""Erasing a user, and what has become of it."""

import asyncio
from typing import Annotated

from litestar import delete, get
from litestar.exceptions import HTTPException
from litestar.params import Parameter

from stream.answers import Erased
from stream.events import BadEvent
from workers.erasure import UnknownReceipt, status
from workers.routes import Served, asking_kafka, example, route
from workers.routes_recommend import UserId

ReceiptId = Annotated[str, Parameter(max_length=40, description="as DELETE gave it", examples=example("3-1207"))]


@delete(
    "/v1/users/{user_id:str}",
    status_code=202,
    summary="Forget a user",
    description="At once in this server's answers, in a moment everywhere else; keep the receipt, not the id. "
    "After a 503 send it again: twice is harmless.",
    tags=["users"],
    **route("admin"),
)
async def erase_user(service: Served, user_id: UserId) -> Erased:
    try:
        with asking_kafka("did not take the erasure"):
            return await service.to_kafka(service.erase, user_id)
    except BadEvent as error:
        raise HTTPException(status_code=400, detail=str(error)) from error


@get(
    "/v1/erasures/{receipt:str}",
    summary="Where an erasure stands",
    tags=["users"],
    **route("admin", 404),
)
async def erasure(service: Served, receipt: ReceiptId) -> Erased:
    try:
        with asking_kafka("does not say"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(service.asking, status, service.settings, receipt)
    except UnknownReceipt as error:
        raise HTTPException(status_code=404, detail=str(error)) from error
