"""The process at the other end: holds the pool that is written, and says what its CPU time is.

python -m benchmarks.moving.far    # told by JSON lines on stdin, answers by lines on stdout
"""

import asyncio
import base64
import json
import socket
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from benchmarks.moving.case import POOL_BYTES, layout_of
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.convert import rank_to_pb
from kv_transfer.group_layout import GroupLayout
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.plane import WriteWindow
from kv_transfer.store.memory import StoreMemory

EPOCH = 1
LEASE_ID = 5
LONG = TransferConfig(lease_s=3600.0, data_timeout_s=30.0)


class Far:
    """One way at a time, for one block size at a time."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._loop = asyncio.new_event_loop()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`do` names what is asked for."""
        do = question.pop("do")
        if do == "cpu":
            return {"cpu_s": time.process_time()}
        if do == "plane":
            return self._plane(**question)
        return self._socket(**question) if do == "socket" else self._nixl(**question)

    def close(self) -> None:
        self._stack.close()
        self._stack = ExitStack()

    def _pool(self, block_bytes: int) -> StoreMemory:
        self.close()
        layout = layout_of(block_bytes)
        num_blocks = POOL_BYTES // block_bytes
        return self._stack.enter_context(StoreMemory(layout, num_blocks))

    def _plane(self, block_bytes: int, data_plane: str) -> dict[str, Any]:
        pool = self._pool(block_bytes)
        rank = LocalReceivingRank(pool, replace(LONG, data_plane=DataPlane(data_plane)))
        offer = self._loop.run_until_complete(rank.start(EPOCH))
        self._stack.callback(lambda: self._loop.run_until_complete(rank.stop()))
        num_tokens = pool.num_blocks * pool.layout.block_size_tokens
        window = WriteWindow(LEASE_ID, tuple(range(pool.num_blocks)), 0, num_tokens)
        self._loop.run_until_complete(rank.open(window))
        (box,) = GroupLayout.single(pool.layout).boxes
        return {"rank": base64.b64encode(rank_to_pb(box, offer).SerializeToString()).decode()}

    def _socket(self, block_bytes: int) -> dict[str, Any]:
        pool = self._pool(block_bytes)
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=_take, args=(listener, pool.host_bytes), daemon=True).start()
        return {"port": listener.getsockname()[1]}

    def _nixl(self, block_bytes: int) -> dict[str, Any]:
        from benchmarks.moving.nixl_way import opened_agent  # only where it is installed

        pool = self._pool(block_bytes)
        agent, registered, base = opened_agent("far", pool)
        self._stack.callback(agent.deregister_memory, registered)
        metadata = base64.b64encode(agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "base": base}


def _take(listener: socket.socket, pool: memoryview) -> None:
    """Receive what comes, each message's length before it, and answer with a byte."""
    sock, _ = listener.accept()
    first = 0
    with sock:
        while head := sock.recv(8, socket.MSG_WAITALL):
            num_bytes = int.from_bytes(head)
            first = first if first + num_bytes <= len(pool) else 0
            got = 0
            while got < num_bytes:
                got += sock.recv_into(pool[first + got : first + num_bytes])
            first += num_bytes
            sock.sendall(b"!")


def main() -> None:
    """Until stdin closes."""
    far = Far()
    for line in sys.stdin:
        print(json.dumps(far.answer(json.loads(line))), flush=True)
    far.close()


if __name__ == "__main__":
    main()
