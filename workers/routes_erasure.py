"""HTTP: erase a user, and ask what has become of it."""

import kafka
from litestar import delete, get
from litestar.exceptions import HTTPException

from stream.events import BadEvent
from stream.producer import BufferFull, DeliveryError
from workers.erasure import Receipt, UnknownReceipt, status
from workers.service import Service


@delete("/v1/users/{user_id:str}", sync_to_thread=True, status_code=202)
def erase_user(service: Service, user_id: str) -> Receipt:
    """Forgets the user: at once in the answers of this server, in a moment everywhere else. Keep the receipt."""
    try:
        return service.erase(user_id)
    except BadEvent as error:
        raise HTTPException(status_code=400, detail=str(error)) from error
    except (DeliveryError, BufferFull, kafka.errors.KafkaError) as error:
        raise HTTPException(
            status_code=503, detail="Kafka did not take the erasure: send it again", headers={"Retry-After": "2"}
        ) from error


@get("/v1/erasures/{receipt:str}", sync_to_thread=True)
def erasure(service: Service, receipt: str) -> Receipt:
    """What has become of an erasure."""
    try:
        return status(service.settings, receipt)
    except UnknownReceipt as error:
        raise HTTPException(status_code=404, detail=str(error)) from error


routes = [erase_user, erasure]
