"""Waiting for layers that are still computed: woken by each, and by the end of the lease."""

import asyncio
import time

import pytest

from engine.errors import KvLeaseLostError
from engine.kv_cache.progress import KvProgress
from kv_transfer.computed import layers_computed
from kv_transfer.plane import WritePermit, WriteStoppedError

WAIT_S = 10.0


def permit_for(left_s: float) -> WritePermit:
    return WritePermit(1, 1, time.monotonic, time.monotonic() + left_s)


async def test_a_wait_ends_with_the_next_layer() -> None:
    progress = KvProgress(4)
    progress.begin(1)
    waiting = asyncio.ensure_future(layers_computed(progress, 1, 0, permit_for(WAIT_S)))
    await asyncio.sleep(0)
    progress.reach(3)
    assert await waiting == 3


async def test_a_wait_ends_when_the_handover_is_given_up() -> None:
    progress, permit = KvProgress(4), permit_for(WAIT_S)
    waiting = asyncio.ensure_future(layers_computed(progress, 1, 0, permit))
    await asyncio.sleep(0)
    permit.stop()
    with pytest.raises(WriteStoppedError):
        await waiting


async def test_a_lease_that_nobody_renews_ends_a_wait_before_the_next_layer() -> None:
    progress = KvProgress(4)
    async with asyncio.timeout(WAIT_S / 5):
        with pytest.raises(KvLeaseLostError):
            await layers_computed(progress, 1, 0, permit_for(0.02))
