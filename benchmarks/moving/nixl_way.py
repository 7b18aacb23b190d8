"""NIXL as its own interface offers it: prepared lists of all blocks, a transfer of some of them."""

import base64
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from nixl_cu12._api import nixl_agent, nixl_agent_config

from benchmarks.moving.case import POOL_BYTES, Case, layout_of
from benchmarks.moving.ways import FarProcess, Move
from kv_transfer.copying import Offsets
from kv_transfer.store.memory import StoreMemory

Indices = npt.NDArray[np.int32]


def opened_agent(name: str, pool: StoreMemory) -> tuple[Any, Any, int]:
    """An agent with a progress thread, as it comes; what it has registered; the pool's address."""
    logging.getLogger("nixl").setLevel(logging.WARNING)
    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    base = np.frombuffer(pool.host_bytes, np.uint8).ctypes.data
    registered = agent.register_memory(
        [(base, pool.num_blocks * pool.layout.block_bytes, 0, "")], "DRAM"
    )
    return agent, registered, base


class Nixl:
    """`operation`: WRITE or READ."""

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def open(self, far: FarProcess, block_bytes: int, stack: ExitStack) -> Move:
        layout = layout_of(block_bytes)
        num_blocks = POOL_BYTES // block_bytes
        pool = stack.enter_context(StoreMemory(layout, num_blocks))
        there_is = far.ask("nixl", block_bytes=block_bytes)
        agent, registered, base = opened_agent("near", pool)
        peer = agent.add_remote_agent(base64.b64decode(there_is["metadata"]))
        starts = np.arange(num_blocks, dtype=np.uint64) * np.uint64(block_bytes)
        lists = [
            agent.prep_xfer_dlist(name, _rows(starts + np.uint64(first), block_bytes), "DRAM")
            for name, first in (("NIXL_INIT_AGENT", base), (peer, there_is["base"]))
        ]
        stack.callback(agent.deregister_memory, registered)
        stack.callback(agent.remove_remote_agent, peer)
        for prepared in reversed(lists):
            stack.callback(prepared.release)

        def ready(case: Case, here: Offsets, there: Offsets) -> Callable[[], object]:
            return partial(move, here.astype(np.int32), there.astype(np.int32))

        def move(here: Indices, there: Indices) -> None:
            transfer = agent.make_prepped_xfer(self._operation, lists[0], here, lists[1], there)
            state = agent.transfer(transfer)
            while state == "PROC":
                time.sleep(0)  # the progress thread may have this core
                state = agent.check_xfer_state(transfer)
            assert state == "DONE", state
            agent.release_xfer_handle(transfer)

        return ready


def _rows(starts: "np.ndarray[tuple[int], np.dtype[np.uint64]]", block_bytes: int) -> Any:  # noqa: ANN401
    return np.stack([starts, np.full_like(starts, block_bytes), np.zeros_like(starts)], axis=1)
