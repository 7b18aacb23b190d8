"""Frames of data connections: header, block ids, payload, checksum; an answer after each push.

Big-endian. A frame carries the same slots of the same box of some blocks, block by block, each
slots_LJGNX as in `blocks`. Header and block ids have checksums of their own, so that a damaged
one is found before its payload falls into the wrong place, and so has the answer.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import xxhash

from kv_transfer.copying import Offsets
from kv_transfer.reshard import Box

MAGIC = b"ISKV"
VERSION = 3

# magic, version, flags, reserved, writer id, push, lease id, epoch, blocks, first slot, slots,
# first layer, layers, first head, heads, bytes, checksum of the block ids
_HEADER = struct.Struct(">4sBBHQQQQIIIIIIIQQ")
# magic, version, status, reserved, push, lease id
_ANSWER = struct.Struct(">4sBBHQQ")
_SEAL = struct.Struct(">Q")
HEADER_BYTES = _HEADER.size + _SEAL.size
ANSWER_BYTES = _ANSWER.size + _SEAL.size
BLOCK_ID = np.dtype(">u4")
CHECKSUM_BYTES = _SEAL.size
MAX_BLOCKS = 1024
"""In one frame."""


_LAST, _CHECKSUM = 1, 2
"""Flags."""


class PushStatus(IntEnum):
    WRITTEN = 1
    LEASE_LOST = 2
    """Nothing of the push was kept, or only its first frames, in blocks that nobody reads. Also
    for a push after which its writer has begun another one."""
    CORRUPT = 3
    REFUSED = 4
    """A frame is not what the lease allows; the connection closes."""


class FrameError(Exception):
    """Bytes on the data port that no sender of ours would send; the text is a metric label."""


class FrameHeader(NamedTuple):
    is_last: bool
    """The push ends with this frame on this connection: answer it."""
    has_checksum: bool
    """The payload's xxh3_64 follows it, CHECKSUM_BYTES: so it is taken piece by piece of what goes
    over the connection, while the other end has what went before."""
    writer_id: int
    """Random; one for each link of a sending rank, whatever it connects and reconnects."""
    push: int
    """Counts the pushes of the writer. A push that is given up is repeated under the next number,
    and the first frame of that shuts the earlier one out."""
    lease_id: int
    epoch: int
    num_blocks: int
    first_slot: int
    num_slots: int
    box: Box
    """Of the receiving rank's pool."""
    num_bytes: int
    ids_checksum: int

    def to_bytes(self) -> bytes:
        return _sealed(
            _HEADER.pack(
                MAGIC,
                VERSION,
                _LAST * self.is_last | _CHECKSUM * self.has_checksum,
                0,
                self.writer_id,
                self.push,
                self.lease_id,
                self.epoch,
                self.num_blocks,
                self.first_slot,
                self.num_slots,
                self.box.first_layer,
                self.box.num_layers,
                self.box.first_head,
                self.box.num_heads,
                self.num_bytes,
                self.ids_checksum,
            )
        )


def header_from(data: bytes | bytearray) -> FrameHeader:
    """Parse HEADER_BYTES bytes; raises FrameError unless they are a header of this version."""
    magic, version, flags, reserved, *rest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FrameError("bad_magic")
    if version != VERSION:
        raise FrameError("bad_version")
    if not _is_sealed(data):
        raise FrameError("damaged")
    if reserved or flags > _LAST | _CHECKSUM:
        raise FrameError("bad_flags")
    writer_id, push, lease_id, epoch, num_blocks, first_slot, num_slots, *box, size, ids = rest
    return FrameHeader(
        bool(flags & _LAST),
        bool(flags & _CHECKSUM),
        *(writer_id, push, lease_id, epoch),
        *(num_blocks, first_slot, num_slots),
        Box(*box),
        *(size, ids),
    )


def checksum_to_bytes(checksum: int) -> bytes:
    return _SEAL.pack(checksum)


def is_checksum(data: bytes | bytearray, checksum: int) -> bool:
    """Whether these CHECKSUM_BYTES say the same."""
    return bool(_SEAL.unpack(data)[0] == checksum)


def ids_to_bytes(block_ids: Offsets) -> bytes:
    return block_ids.astype(BLOCK_ID).tobytes()


def ids_from(header: FrameHeader, data: bytes | bytearray | memoryview) -> Offsets:
    """Parse the block ids behind a header; raises FrameError when they were damaged."""
    if xxhash.xxh3_64_intdigest(data) != header.ids_checksum:
        raise FrameError("damaged")
    return np.frombuffer(data, BLOCK_ID).astype(np.int64)


class PushAnswer(NamedTuple):
    status: PushStatus
    push: int
    lease_id: int

    def to_bytes(self) -> bytes:
        return _sealed(_ANSWER.pack(MAGIC, VERSION, self.status, 0, self.push, self.lease_id))


def answer_from(data: bytes | bytearray) -> PushAnswer:
    """Parse ANSWER_BYTES bytes; raises FrameError unless they are an answer of this version."""
    magic, version, status, reserved, push, lease_id = _ANSWER.unpack_from(data)
    if magic != MAGIC or version != VERSION or reserved or not _is_sealed(data):
        raise FrameError("bad_answer")
    try:
        return PushAnswer(PushStatus(status), push, lease_id)
    except ValueError:
        raise FrameError("bad_answer") from None


def _sealed(data: bytes) -> bytes:
    return data + _SEAL.pack(xxhash.xxh3_64_intdigest(data))


def _is_sealed(data: bytes | bytearray) -> bool:
    seal: int = _SEAL.unpack_from(data, len(data) - _SEAL.size)[0]
    return seal == xxhash.xxh3_64_intdigest(memoryview(data)[: -_SEAL.size])
