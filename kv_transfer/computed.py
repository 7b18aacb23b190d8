"""Waits for KV that this process is computing."""

import asyncio
import contextlib

from engine.kv_cache.progress import KvProgress
from kv_transfer.plane import WritePermit

LOOK_S = 1.0
"""How often a lease is looked at whose end nobody has moved."""


async def layers_computed(
    progress: KvProgress, step: int, num_layers: int, permit: WritePermit
) -> int:
    """How many first layers `step` has written, once they are more than `num_layers`.

    Raises:
        WriteStoppedError, KvLeaseLostError: as `WritePermit.check`, while it waits: also of a lease
            that ends because nobody renews it, long before the next layer is there.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(changed.set)

    permit.on_change.add(changed.set)
    try:
        with progress.telling(wake):
            while True:
                permit.check()
                if (reached := progress.layers_of(step)) > num_layers:
                    return reached
                left_s = permit.deadline_s - permit.clock()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(max(left_s, 0.0), LOOK_S)):
                        await changed.wait()
                changed.clear()
    finally:
        permit.on_change.discard(changed.set)
