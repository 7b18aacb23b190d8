"""What a connection of the nixl plane carries beside frames; big-endian, with checksums.

First the metadata of the sender's agent; then, behind the block ids of each frame, the addresses
of its runs in the sender's memory, in the order of slots_LJGNX, as many a block as the coarsest
grain has that both ends share.
"""

import struct

import numpy as np
import xxhash

from kv_transfer.data_listener import Connection
from kv_transfer.frame import FrameError
from kv_transfer.frame_reader import receive_all
from kv_transfer.nixl_agent import Addresses

MAGIC = b"ISKN"
MAX_METADATA_BYTES = 1 << 20

# magic, bytes or addresses that follow, checksum of the eight bytes before and of what follows
_HEAD = struct.Struct(">4sI")
_SEAL = struct.Struct(">Q")
_ADDRESS = np.dtype(">u8")


def greeting(metadata: bytes) -> bytes:
    return _sealed(len(metadata), metadata)


def receive_greeting(connection: Connection, *, timeout_s: float) -> bytes:
    """The metadata; raises FrameError for anything else."""
    return _receive(connection, range(1, MAX_METADATA_BYTES + 1), 1, timeout_s=timeout_s)


def addresses_to_bytes(addresses: Addresses) -> bytes:
    return _sealed(len(addresses), addresses.astype(_ADDRESS).tobytes())


def receive_addresses(connection: Connection, bounds: range, *, timeout_s: float) -> Addresses:
    """As many as `bounds` allows; raises FrameError for anything else."""
    data = _receive(connection, bounds, _ADDRESS.itemsize, timeout_s=timeout_s)
    return np.frombuffer(data, _ADDRESS).astype(np.uint64)


def _sealed(count: int, data: bytes) -> bytes:
    head = _HEAD.pack(MAGIC, count)
    return head + _SEAL.pack(xxhash.xxh3_64_intdigest(head + data)) + data


def _receive(connection: Connection, bounds: range, unit_bytes: int, *, timeout_s: float) -> bytes:
    head, seal = bytearray(_HEAD.size), bytearray(_SEAL.size)
    receive_all(connection, memoryview(head), memoryview(seal), timeout_s=timeout_s)
    magic, count = _HEAD.unpack(head)
    if magic != MAGIC:
        raise FrameError("bad_magic")
    if count not in bounds:
        raise FrameError("bad_length")
    data = bytearray(count * unit_bytes)
    receive_all(connection, memoryview(data), timeout_s=timeout_s)
    if _SEAL.unpack(seal)[0] != xxhash.xxh3_64_intdigest(bytes(head) + data):
        raise FrameError("damaged")
    return bytes(data)
