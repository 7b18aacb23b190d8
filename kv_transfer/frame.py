"""The tcp data plane's frames: a fixed header before each payload, a fixed answer after each push.

Big-endian. A frame carries neighbouring slots of a box of one block: slots_LJGNX as in `blocks`.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from kv_transfer.reshard import Box

MAGIC = b"ISKV"
VERSION = 3

# magic, version, flags, reserved, writer id, push, lease id, epoch, block id, first slot, slots,
# first layer, layers, first head, heads, bytes, checksum
_HEADER = struct.Struct(">4sBBHQQQQIIIIIIIIQ")
# magic, version, status, reserved, push, lease id
_ANSWER = struct.Struct(">4sBBHQQ")
HEADER_BYTES = _HEADER.size
ANSWER_BYTES = _ANSWER.size


class FrameFlag(IntFlag):
    LAST = 1
    """The push ends with this frame: answer it."""
    CHECKSUM = 2
    """`checksum` is the payload's xxh3_64."""


_ALL_FLAGS = int(FrameFlag.LAST | FrameFlag.CHECKSUM)


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


@dataclass(frozen=True, slots=True)
class FrameHeader:
    flags: FrameFlag
    writer_id: int
    """Random; one for each link of a sending rank, whatever it connects and reconnects."""
    push: int
    """Counts the pushes of the writer. A push that is given up is repeated under the next number,
    and the first frame of that shuts the earlier one out."""
    lease_id: int
    epoch: int
    block_id: int
    first_slot: int
    num_slots: int
    box: Box
    """Of the receiving rank's pool."""
    num_bytes: int
    checksum: int

    def to_bytes(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.flags,
            0,
            self.writer_id,
            self.push,
            self.lease_id,
            self.epoch,
            self.block_id,
            self.first_slot,
            self.num_slots,
            self.box.first_layer,
            self.box.num_layers,
            self.box.first_head,
            self.box.num_heads,
            self.num_bytes,
            self.checksum,
        )


def header_from(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Parse HEADER_BYTES bytes; raises FrameError unless they are a header of this version."""
    magic, version, flags, reserved, *place, num_bytes, checksum = _HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError("bad_magic")
    if version != VERSION:
        raise FrameError("bad_version")
    if reserved or flags > _ALL_FLAGS:
        raise FrameError("bad_flags")
    writer_id, push, lease_id, epoch, block_id, first_slot, num_slots, *box = place
    return FrameHeader(
        flags=FrameFlag(flags),
        writer_id=writer_id,
        push=push,
        lease_id=lease_id,
        epoch=epoch,
        block_id=block_id,
        first_slot=first_slot,
        num_slots=num_slots,
        box=Box(*box),
        num_bytes=num_bytes,
        checksum=checksum,
    )


@dataclass(frozen=True, slots=True)
class PushAnswer:
    status: PushStatus
    push: int
    lease_id: int

    def to_bytes(self) -> bytes:
        return _ANSWER.pack(MAGIC, VERSION, self.status, 0, self.push, self.lease_id)


def answer_from(data: bytes | bytearray | memoryview) -> PushAnswer:
    """Parse ANSWER_BYTES bytes; raises FrameError unless they are an answer of this version."""
    magic, version, status, reserved, push, lease_id = _ANSWER.unpack(data)
    if magic != MAGIC or version != VERSION or reserved:
        raise FrameError("bad_answer")
    try:
        return PushAnswer(PushStatus(status), push, lease_id)
    except ValueError:
        raise FrameError("bad_answer") from None
