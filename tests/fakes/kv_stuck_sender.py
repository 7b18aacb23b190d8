"""A prefill worker that hangs in the middle of a push, to be killed by a test.

python -m tests.fakes.kv_stuck_sender ADDRESS shm|tcp
"""

import asyncio
import sys
import threading
from dataclasses import replace
from typing import Any

from kv_transfer import stream
from kv_transfer.config import DataPlane
from kv_transfer.copying import BlockCopies
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from mesh.channel import open_channel
from tests.fakes.kv_memory import HostMemory
from tests.fakes.kv_pair import FAST

whole_copy = BlockCopies.copy


def hang() -> None:
    sys.stdout.write("in the middle\n")
    sys.stdout.flush()
    threading.Event().wait()


def hang_in_copy(copies: BlockCopies, first: int, end: int) -> None:
    whole_copy(copies, first, first + max(1, (end - first) // 2))
    hang()


def hang_in_send(sock: Any, *buffers: bytes | memoryview, **_: Any) -> None:
    data = b"".join(buffers)
    sock.sendall(data[: len(data) // 2])
    hang()


async def main(address: str, plane: str) -> None:
    if plane == "shm":
        BlockCopies.copy = hang_in_copy  # type: ignore[assignment, method-assign]
    else:
        stream.send = hang_in_send
    config = replace(FAST, data_plane=DataPlane(plane))
    with HostMemory().fill_randomly(1) as local:
        async with (
            KvSender(
                SendingGroup.single(local, config),
                sender_id="prefill-0",
                model_digest="abc",
                open_channel=open_channel,
                config=config,
            ) as sender,
            sender.handover("r", decode_address=address, num_tokens=13) as handover,
        ):
            await handover.push([0, 1, 2, 3], 0, 13)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
