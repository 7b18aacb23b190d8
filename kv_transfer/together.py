"""Several things at once, of which there is mostly one; and things that must come to an end."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all to their end; their results in order.

    A single one is simply awaited. The first that raises cancels the others, and its error comes
    out as it is, when all have ended.
    """
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in running]


async def to_its_end(work: Coroutine[Any, Any, None] | asyncio.Task[None]) -> None:
    """Run `work`, which ends by itself soon and raises nothing, even if the caller is cancelled."""
    running = asyncio.ensure_future(work)
    cancellation = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation
    running.result()
