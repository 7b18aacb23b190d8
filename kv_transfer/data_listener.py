"""A data port: accepts senders and gives each a thread of its own."""

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from kv_transfer import stream
from kv_transfer.config import address_from
from kv_transfer.frame import FrameError

logger = logging.getLogger(__name__)


class Connection:
    """One sender's socket and the thread that serves it."""

    def __init__(
        self,
        listener: "DataListener",
        sock: socket.socket,
        peer: str,
        serve: Callable[["Connection"], None],
    ) -> None:
        self.socket = sock
        self._listener = listener
        self._peer = peer
        self._serve = serve
        self.thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)

    def shutdown(self) -> None:
        """Make the thread end; from any thread."""
        stream.shutdown(self.socket)

    def _run(self) -> None:
        try:
            stream.prepare(self.socket)
            self._serve(self)
        except FrameError as error:
            self._listener.drop(str(error), self._peer)
        except stream.StalledError:
            self._listener.drop("stalled", self._peer)
        except stream.HandshakeError as error:
            self._listener.drop("tls", f"{self._peer}: {error}")
        except OSError:
            self._listener.drop("broken", self._peer)
        finally:
            self.socket.close()
            self._listener.remove(self)


class DataListener:
    """Listens from construction on; `close` ends every thread."""

    def __init__(
        self, address: str, *, max_connections: int, serve: Callable[[Connection], None]
    ) -> None:
        """Raises OSError when the address cannot be bound.

        Args:
            address: host:port.
            max_connections: more are refused.
            serve: reads a connection to its end, in its thread; raises FrameError to cut it.
        """
        self.dropped: Counter[str] = Counter()
        """Connections that were closed from this side, by reason."""
        self.connections: set[Connection] = set()
        self._max_connections = max_connections
        self._serve = serve
        self._lock = threading.Lock()
        self._is_closed = False
        self.host, port = address_from(address)
        self._listener = _listener(self.host, port)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            connections = list(self.connections)
        stream.shutdown(self._listener)
        self._thread.join()
        self._listener.close()
        for connection in connections:
            connection.shutdown()
        for connection in connections:
            connection.thread.join()

    def drop(self, reason: str, peer: str) -> None:
        """Count why a connection is closed from this side."""
        with self._lock:
            self.dropped[reason] += 1
        logger.warning("closed data connection peer=%s reason=%s", peer, reason)

    def remove(self, connection: Connection) -> None:
        with self._lock:
            self.connections.discard(connection)

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(stream.TICK_S)  # out of descriptors: the connections may end
                continue
            name = f"{peer[0]}:{peer[1]}"
            if (refusal := self._refusal(sock, name)) is not None:
                sock.close()
                self.drop(refusal, name)

    def _refusal(self, sock: socket.socket, peer: str) -> str | None:
        """Why the connection is not served; None once a thread of its own serves it."""
        with self._lock:
            if self._is_closed or len(self.connections) >= self._max_connections:
                return "too_many"
            connection = Connection(self, sock, peer, self._serve)
            try:
                connection.thread.start()
            except RuntimeError:  # out of threads: others may end
                return "no_thread"
            self.connections.add(connection)
            return None


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
