"""TCP connections among the ranks of a group that are not all on one host.

What is sent lies in the kernel's buffers and travels while the rank computes: no thread has to wake
up for it. Each message says what it is of and its size, which the receiver knows already: ranks
that call different things are found out.
"""

import hmac
import json
import os
import secrets
import select
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch._C._distributed_c10d import Store

from engine.errors import CollectiveTimeoutError

_HEAD = struct.Struct("<IQ")
_HELLO = struct.Struct("<I32s")
_HELLO_TIMEOUT_S = 5.0
"""A stranger that connects and says nothing holds up the start no longer than this."""
_LOOK_S = 100e-6
"""A wait so long gives its core away between looks, then sleeps: waking up takes longer."""
_MAX_VIEWS = 16
"""Handed to the kernel at once."""


class OtherCallError(RuntimeError):
    """A rank sends something else, or another number of bytes, than this one expects."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index


class RankLinks:
    """This rank's connections; used by one thread. Of no use any more after an error."""

    def __init__(self, connections: Mapping[int, socket.socket]) -> None:
        """Take over connected sockets, by position in the group."""
        self._links = {index: _Link(index, each) for index, each in connections.items()}

    def begin(
        self, what: str, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]
    ) -> "Exchange":
        """Send to ranks and receive from them; the tensors must not be touched until it is over.

        Args:
            what: all ranks must say the same.
            sends: flat tensors by position in the group.
            receives: the same; they are of the size that the other rank sends.
        """
        links, kind = [], zlib.crc32(what.encode())
        for index, link in self._links.items():
            if index in sends:
                link.send(kind, sends[index])
            if index in receives:
                link.receive(kind, receives[index])
            if index in sends or index in receives:
                links.append((link, link.num_to_send, link.num_to_receive))
                link.go_on()
        return Exchange(links)

    def close(self) -> None:
        for link in self._links.values():
            link.connection.close()


class Exchange:
    """Messages on their way. Those that began first are over first."""

    def __init__(self, links: "Sequence[tuple[_Link, int, int]]") -> None:
        """Links with how much each must have sent and received by then."""
        self._links = links

    def is_over(self, timeout_s: float) -> bool:
        """Move what there is, and wait for more if that is not all.

        Raises:
            OSError: a connection is lost.
            OtherCallError: a rank sends something else.
        """
        left = self._left()
        look_until_s = time.perf_counter() + _LOOK_S
        while left and time.perf_counter() < look_until_s:
            os.sched_yield()
            left = self._left()
        if not left:
            return True
        poll = select.poll()
        for link in left:
            poll.register(link.connection, link.events)
        poll.poll(timeout_s * 1000)
        return not self._left()

    def _left(self) -> "list[_Link]":
        left = []
        for link, num_to_send, num_to_receive in self._links:
            if link.num_sent < num_to_send or link.num_received < num_to_receive:
                link.go_on()
                if link.num_sent < num_to_send or link.num_received < num_to_receive:
                    left.append(link)
        return left


class _Link:
    """One connection, what is still to be sent through it, and where to put what comes."""

    def __init__(self, index: int, connection: socket.socket) -> None:
        self.index = index
        self.connection = connection
        self.num_to_send = self.num_sent = self.num_to_receive = self.num_received = 0
        """Bytes since the start."""
        self._outgoing: deque[memoryview] = deque()
        self._incoming: deque[memoryview] = deque()
        self._heads: deque[tuple[int, bytearray, bytes]] = deque()
        """The count by which a message's head is there, where it is read to, and the right one."""
        connection.settimeout(0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def events(self) -> int:
        """What to wait for."""
        return (select.POLLOUT if self._outgoing else 0) | (select.POLLIN if self._incoming else 0)

    def send(self, kind: int, x: torch.Tensor) -> None:
        self._outgoing.append(memoryview(_HEAD.pack(kind, x.nbytes)))
        if x.nbytes:
            self._outgoing.append(_bytes_of(x))
        self.num_to_send += _HEAD.size + x.nbytes

    def receive(self, kind: int, x: torch.Tensor) -> None:
        head = bytearray(_HEAD.size)
        self._incoming.append(memoryview(head))
        if x.nbytes:
            self._incoming.append(_bytes_of(x))
        right = _HEAD.pack(kind, x.nbytes)
        self._heads.append((self.num_to_receive + _HEAD.size, head, right))
        self.num_to_receive += _HEAD.size + x.nbytes

    def go_on(self) -> None:
        """Send and receive without waiting."""
        try:
            while self._outgoing:
                num_bytes = self.connection.sendmsg(_first(self._outgoing))
                self.num_sent += num_bytes
                _advance(self._outgoing, num_bytes)
        except BlockingIOError:
            pass
        try:
            while self._incoming:
                num_bytes = self.connection.recvmsg_into(_first(self._incoming))[0]
                if num_bytes == 0:
                    raise ConnectionResetError("the other rank closed the connection")
                self.num_received += num_bytes
                _advance(self._incoming, num_bytes)
                self._check_heads()
        except BlockingIOError:
            pass

    def _check_heads(self) -> None:
        while self._heads and self._heads[0][0] <= self.num_received:
            _, head, right = self._heads.popleft()
            if head != right:
                (_, expected), (_, found) = _HEAD.unpack(right), _HEAD.unpack(head)
                more = " of another call" if found == expected else ""
                text = f"{expected} bytes were expected, {found} come{more}"
                raise OtherCallError(self.index, text)


def open_links(
    store: Store, index: int, size: int, *, own_address: str, timeout_s: float
) -> RankLinks:
    """Connect to every other rank of a group; each of them must call this.

    Args:
        store: of this group alone.
        index: this rank's position.
        size: of the group.
        own_address: where the others reach this rank.
        timeout_s: for all of it.

    Raises:
        CollectiveTimeoutError: a rank did not come.
        DistNetworkError: the store is lost.
        DistStoreError: a rank has not even said there where it is.
        ValueError: `own_address` is none of this host's.
    """
    end_s = time.monotonic() + timeout_s
    connections: dict[int, socket.socket] = {}
    token = secrets.token_hex(16)
    try:
        listener = socket.create_server((own_address, 0), family=_family(own_address), backlog=size)
    except OSError as error:
        raise ValueError(f"this rank cannot listen on {own_address}: {error}") from None
    with listener, ExitStack() as undo:
        place = {"host": own_address, "port": listener.getsockname()[1], "token": token}
        store.set(f"link/{index}", json.dumps(place))
        for other in range(index):  # they need not accept yet
            there = json.loads(store.get(f"link/{other}"))
            address, left_s = (there["host"], there["port"]), _left_s(end_s)
            try:
                connection = undo.enter_context(socket.create_connection(address, left_s))
                connection.sendall(_HELLO.pack(index, there["token"].encode()))
            except OSError as error:
                who = f"number {other} at {there['host']} port {there['port']}"
                raise _missed(who, timeout_s, error) from error
            connections[other] = connection
        while missing := sorted(set(range(index + 1, size)) - set(connections)):
            listener.settimeout(_left_s(end_s))
            try:
                connection, _ = listener.accept()
            except OSError as error:
                raise _missed(f"numbers {missing}", timeout_s, error) from error
            index_there = _introduced(connection, token, min(_HELLO_TIMEOUT_S, _left_s(end_s)))
            if index_there in missing:
                connections[index_there] = undo.enter_context(connection)
            else:
                connection.close()
        undo.pop_all()
    return RankLinks(connections)


def _left_s(end_s: float) -> float:
    return max(0.001, end_s - time.monotonic())


def _missed(who: str, timeout_s: float, error: OSError) -> CollectiveTimeoutError:
    """`who` by position in the group."""
    text = f"not all ranks of a group connected within {timeout_s:g} s: {who}: {error}"
    return CollectiveTimeoutError(text, rank=None, operation="join")


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def _introduced(connection: socket.socket, token: str, timeout_s: float) -> int | None:
    """The position of the rank that this connection proves to be; None for anybody else."""
    connection.settimeout(timeout_s)
    try:
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
    except OSError:
        return None
    if len(hello) < _HELLO.size:
        return None
    index, said = _HELLO.unpack(hello)
    return int(index) if hmac.compare_digest(said, token.encode()) else None


def _bytes_of(x: torch.Tensor) -> memoryview:
    array = x.view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # a buffer, which numpy's stubs do not say


def _first(views: deque[memoryview]) -> list[memoryview]:
    return [view for view, _ in zip(views, range(_MAX_VIEWS), strict=False)]


def _advance(views: deque[memoryview], num_bytes: int) -> None:
    """Drop what is done with."""
    while num_bytes:
        view = views.popleft()
        if num_bytes < len(view):
            views.appendleft(view[num_bytes:])
        num_bytes -= min(num_bytes, len(view))
