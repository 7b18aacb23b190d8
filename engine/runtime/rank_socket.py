"""A stream socket between rank 0 and one other rank of a worker, and how the two find each other.

Rank 0 listens on a free port. Address and a random token go round by the group's own broadcast; who
connects says the token, so that nobody else who can reach the port becomes a rank. A socket that
ends tells either side of the other's death, with nothing to poll and no time-out while idle.
"""

import hmac
import json
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping

from engine.errors import CollectiveTimeoutError, RankDeadError
from engine.parallel.axes import AxisGroup
from engine.runtime.rank_message import (
    LENGTH_BYTES,
    MAX_START_BYTES,
    FollowerMessage,
    Hello,
    LeaderMessage,
    decode_from_follower,
    encode,
)

_MAX_ADDRESS_BYTES = 1024
_HELLO_TIMEOUT_S = 5.0
"""A stranger that connects and says nothing holds up the start no longer than this."""


class RankSocket:
    """Frames to and from one other rank. Any thread may write, and one read."""

    def __init__(self, connection: socket.socket, peer: int, *, send_timeout_s: float) -> None:
        """Take over a connected socket.

        Args:
            connection: closed with this.
            peer: global rank of the other side, for error texts.
            send_timeout_s: a peer that reads nothing for so long is taken for stopped.
        """
        self.peer = peer
        self.max_bytes = MAX_START_BYTES
        """Of one frame that comes in; raised once both sides know their limits."""
        self._connection = connection
        self._send_timeout_s = send_timeout_s
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_timeout_s))
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: FollowerMessage | LeaderMessage) -> None:
        """Write a message.

        Raises:
            RankDeadError: the other side is gone.
            CollectiveTimeoutError: it has not read for `send_timeout_s`.
        """
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes | bytearray) -> None:
        """`send` for a message that is encoded already."""
        try:
            with self._sending:
                self._connection.sendall(frame)
        except BlockingIOError:
            text = f"rank {self.peer} took no step plan for {self._send_timeout_s:g} s"
            raise CollectiveTimeoutError(text, rank=self.peer, operation="step plan") from None
        except OSError:
            raise self.gone() from None

    def has_data(self, timeout_s: float | None) -> bool:
        """Wait until there is something to read or the other side is gone; None waits for ever."""
        return bool(self._poll.poll(None if timeout_s is None else timeout_s * 1000))

    def receive(self) -> bytearray:
        """Read one message, without its length; waits as long as the other side lives.

        Raises:
            RankDeadError: the other side is gone.
            ValueError: the message is longer than `max_bytes`.
        """
        num_bytes = int.from_bytes(self._exactly(LENGTH_BYTES), "little")
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"rank {self.peer} announces a message of {num_bytes} bytes, "
                f"{self.max_bytes} are allowed"
            )
        return self._exactly(num_bytes)

    def gone(self) -> RankDeadError:
        """The error for the end of the stream."""
        return RankDeadError(f"rank {self.peer} is gone", rank=self.peer, operation="step plan")

    def close(self) -> None:
        self._connection.close()

    def _exactly(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        try:
            while view:
                num_read = self._connection.recv_into(view)
                if num_read == 0:
                    raise self.gone()
                view = view[num_read:]
        except OSError:
            raise self.gone() from None
        return data


def accept_followers(
    world: AxisGroup, host: str, *, timeout_s: float, send_timeout_s: float
) -> dict[int, RankSocket]:
    """Rank 0: listen on a free port of `host` until every other rank has come; by rank.

    `world` makes one broadcast, which the others make in `connect_to_leader`.

    Raises:
        CollectiveTimeoutError: a rank did not come in time; the text names them.
        ValueError: `host` is not an address of this host.
    """
    token = secrets.token_hex(16)
    found: dict[int, RankSocket] = {}
    try:
        listener = socket.create_server((host, 0), backlog=world.size)
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on {host}: {error}; MASTER_ADDR must be an address of its host"
        ) from None
    with listener:
        address = {"host": host, "port": listener.getsockname()[1], "token": token}
        world.broadcast_bytes(json.dumps(address).encode(), 0, max_bytes=_MAX_ADDRESS_BYTES)
        end_s = time.monotonic() + timeout_s
        try:
            while missing := sorted(set(range(1, world.size)) - set(found)):
                listener.settimeout(max(0.001, end_s - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    raise CollectiveTimeoutError(
                        f"ranks {missing} did not connect to rank 0 within {timeout_s:g} s",
                        rank=missing[0],
                        operation="join",
                    ) from None
                rank = _introduced(connection, token, missing)
                if rank is None:
                    connection.close()
                else:
                    found[rank] = RankSocket(connection, rank, send_timeout_s=send_timeout_s)
        except BaseException:
            for follower in found.values():
                follower.close()
            raise
    return found


def connect_to_leader(world: AxisGroup, *, timeout_s: float, send_timeout_s: float) -> RankSocket:
    """Every rank but 0: connect to rank 0.

    Raises:
        RankDeadError: rank 0 is gone already.
    """
    address = json.loads(world.broadcast_bytes(None, 0, max_bytes=_MAX_ADDRESS_BYTES))
    try:
        connection = socket.create_connection((address["host"], address["port"]), timeout_s)
    except OSError as error:
        raise RankDeadError(f"rank 0 is gone: {error}", rank=0, operation="join") from None
    leader = RankSocket(connection, 0, send_timeout_s=send_timeout_s)
    leader.send(Hello(world.rank, address["token"]))
    return leader


def _introduced(connection: socket.socket, token: str, missing: list[int]) -> int | None:
    """The rank that this connection proves to be; None for anybody else."""
    connection.settimeout(_HELLO_TIMEOUT_S)
    try:
        length = int.from_bytes(connection.recv(LENGTH_BYTES, socket.MSG_WAITALL), "little")
        if length > MAX_START_BYTES:
            return None
        hello = decode_from_follower(connection.recv(length, socket.MSG_WAITALL))
    except (OSError, ValueError):
        return None
    if not isinstance(hello, Hello) or hello.rank not in missing:
        return None
    return hello.rank if hmac.compare_digest(hello.token.encode(), token.encode()) else None


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, int((seconds - whole) * 1e6))


def by_descriptor(sockets: Mapping[int, RankSocket]) -> dict[int, RankSocket]:
    """The same sockets by file descriptor, as poll reports them."""
    return {each.fileno(): each for each in sockets.values()}
