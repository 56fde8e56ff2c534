"""Looking: the catalogue, and what is kept of a user."""

from typing import Annotated

from litestar import get
from litestar.exceptions import HTTPException
from litestar.params import Parameter

from stream.answers import ItemsOut, UserOut
from workers.routes import Served, example, route
from workers.routes_recommend import UserId


@get(
    "/v1/items",
    sync_to_thread=True,
    summary="Items of the catalogue",
    description="Those whose title or id has the words; all where there are none.",
    tags=["catalogue"],
    **route("read"),
)
def items(
    service: Served,
    limit: Annotated[int, Parameter(ge=1, le=200, description="items at most")] = 50,
    q: Annotated[
        str, Parameter(max_length=200, description="in the title or the id, in any case", examples=example("tide"))
    ] = "",
) -> ItemsOut:
    return ItemsOut(service.items(limit, q))


@get(
    "/v1/users/{user_id:str}",
    sync_to_thread=False,
    summary="What is kept of a user",
    description="The state in readable form, for support staff. 404 for a user of whom nothing is known.",
    tags=["users"],
    **route("admin", 404),
)
def user(service: Served, user_id: UserId) -> UserOut:
    if found := service.user(user_id):
        return found
    raise HTTPException(status_code=404, detail="user_id: nothing is known of this user")
