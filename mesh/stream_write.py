"""Writing a message of a stream whole, whatever happens to the writer meanwhile."""

import asyncio
from typing import Any

from grpc import aio


async def write_whole(context: aio.ServicerContext[Any, Any], message: object) -> None:
    """Write `message`; a cancelled writer stays until grpc has taken it or the call has ended.

    grpc.aio refuses to end a call while a write of it is under way (`TOO_MANY_OPERATIONS`), and
    then its client waits for ever. So a write that something else in the handler may cancel has
    to go through here; one that only the end of the call cancels need not.
    """
    writing = asyncio.ensure_future(context.write(message))
    cancelled = False
    while not writing.done():
        try:
            await asyncio.wait([writing])
        except asyncio.CancelledError:
            cancelled = True
    failure = writing.exception()
    if cancelled:
        raise asyncio.CancelledError
    if failure is not None:
        raise failure
