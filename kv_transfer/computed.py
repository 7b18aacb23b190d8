"""Waits for KV that this process is computing."""

import asyncio

from engine.kv_cache.progress import KvProgress
from kv_transfer.plane import WritePermit


async def layers_computed(
    progress: KvProgress, step: int, num_layers: int, permit: WritePermit
) -> int:
    """How many first layers `step` has written, once they are more than `num_layers`.

    Raises:
        WriteStoppedError, KvLeaseLostError: as `WritePermit.check`, while it waits.
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
                await changed.wait()
                changed.clear()
    finally:
        permit.on_change.discard(changed.set)
