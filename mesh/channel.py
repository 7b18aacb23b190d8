"""Open channels between services, with the limits that the servers have."""

import asyncio

from grpc import aio

from mesh.limits import CHANNEL_OPTIONS


def open_channel(address: str) -> aio.Channel:
    """A channel to `address` (host:port); it connects with the first call.

    Use as `async with open_channel(address) as channel:`. Failed calls raise AioRpcError, which
    `mesh.status.error_from_rpc` turns into what the servicer raised.
    """
    return aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def is_cancelled() -> bool:
    """Whether somebody has cancelled the running task.

    Else a CancelledError in it is that of a call: grpc cancels the calls of a channel that closes.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
