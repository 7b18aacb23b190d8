"""The tcp data plane's frames: a fixed header before each payload, a fixed answer after each push.

Big-endian. A frame carries slots of one block, rows outermost: [R, num_slots, X] as in `blocks`.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

MAGIC = b"ISKV"
VERSION = 1

# magic, version, flags, reserved, push, lease id, epoch, block id, first slot, slots, bytes,
# checksum
_HEADER = struct.Struct(">4sBBHIQQIIIIQ")
# magic, version, status, reserved, push, lease id
_ANSWER = struct.Struct(">4sBBHIQ")
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
    """Nothing of the push was kept, or only its first frames, in blocks that nobody reads."""
    CORRUPT = 3
    REFUSED = 4
    """A frame is not what the lease allows; the connection closes."""


class FrameError(Exception):
    """Bytes on the data port that no sender of ours would send; the text is a metric label."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    flags: FrameFlag
    push: int
    """Counts the pushes of one connection."""
    lease_id: int
    epoch: int
    block_id: int
    first_slot: int
    num_slots: int
    num_bytes: int
    checksum: int

    def to_bytes(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.flags,
            0,
            self.push,
            self.lease_id,
            self.epoch,
            self.block_id,
            self.first_slot,
            self.num_slots,
            self.num_bytes,
            self.checksum,
        )


def header_from(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Parse HEADER_BYTES bytes; raises FrameError unless they are a header of this version."""
    magic, version, flags, reserved, *fields = _HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError("bad_magic")
    if version != VERSION:
        raise FrameError("bad_version")
    if reserved or flags > _ALL_FLAGS:
        raise FrameError("bad_flags")
    return FrameHeader(FrameFlag(flags), *fields)


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
