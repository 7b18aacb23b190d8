"""A handover over NIXL between two processes; UCX_TLS says which ways UCX may take.

python -m tests.fakes.kv_nixl_pair            # the decode worker; starts the prefill worker
python -m tests.fakes.kv_nixl_pair ADDRESS    # the prefill worker
"""

import asyncio
import subprocess
import sys
from dataclasses import replace

import numpy as np

from kv_transfer.config import DataPlane
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from mesh.channel import open_channel
from tests.fakes.engine import FakeEngine
from tests.fakes.kv_memory import HostMemory
from tests.fakes.kv_pair import FAST, serving

CONFIG = replace(FAST, data_plane=DataPlane.NIXL, lease_s=10.0)
LOCAL_BLOCKS = [9, 2, 7, 4]


async def decode() -> None:
    with HostMemory() as remote, HostMemory().fill_randomly(1) as expected:
        engine = FakeEngine(num_blocks=16, block_size_tokens=4)
        receiver = KvReceiver(
            engine,
            ReceivingGroup.single(remote, CONFIG),
            receiver_id="decode-0",
            model_digest="abc",
            config=CONFIG,
        )
        async with receiver, serving(receiver) as address:
            prefill = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.fakes.kv_nixl_pair", address, stdout=subprocess.PIPE
            )
            said, _ = await prefill.communicate()
            assert prefill.returncode == 0
            assert engine.committed == [("r", 7)]
            arrived = remote.tokens([int(word) for word in said.split()], 0, 13)
            np.testing.assert_array_equal(arrived, expected.tokens(LOCAL_BLOCKS, 0, 13))
    sys.stdout.write("handed over\n")


async def prefill(address: str) -> None:
    with HostMemory().fill_randomly(1) as local:
        async with (
            KvSender(
                SendingGroup.single(local, CONFIG),
                sender_id="prefill-0",
                model_digest="abc",
                open_channel=open_channel,
                config=CONFIG,
            ) as sender,
            sender.handover("r", decode_address=address, num_tokens=13) as handover,
        ):
            await handover.push(LOCAL_BLOCKS, 0, 5)
            await handover.push(LOCAL_BLOCKS, 5, 8)
            await handover.commit(7)
            assert handover.report.data_plane == "nixl"
            sys.stdout.write(" ".join(map(str, handover.block_ids)))


if __name__ == "__main__":
    asyncio.run(prefill(*sys.argv[1:]) if sys.argv[1:] else decode())
