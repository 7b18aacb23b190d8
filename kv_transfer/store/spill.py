"""Blocks that the store's memory had no room for, as files; least recently used first out.

A file appears under its name only when it is whole (written elsewhere, then renamed) and is
believed only when its checksum fits, so nothing needs to be flushed and a crash costs nothing.
What a store finds in its folder at start it has. Nobody but its user may read the files: KV tells
of prompts.
"""

import contextlib
import fcntl
import logging
import os
import queue
import re
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Self

import xxhash

logger = logging.getLogger(__name__)

CHECKSUM_BYTES = 16
MAX_WAITING_BYTES = 64 << 20
"""Evicted blocks that wait for the disk; a slower disk than this loses some."""
_NAME = re.compile(r"[0-9a-f]{64}\.kv")


class Spill:
    """Blocks of one layout in a folder of their own; a context manager. Any thread may call it."""

    def __init__(self, folder: Path, *, block_bytes: int, max_bytes: int) -> None:
        """Nothing is touched before the context is entered.

        Args:
            folder: made if need be.
            block_bytes: of every block.
            max_bytes: of all files.

        Raises:
            ValueError: not one block fits.
        """
        self.dropped: Counter[str] = Counter()
        """Blocks that did not get here or did not come back, by reason."""
        self._folder = folder
        self._block_bytes = block_bytes
        self._max_blocks = max_bytes // (block_bytes + CHECKSUM_BYTES)
        if self._max_blocks < 1:
            raise ValueError(f"spill_bytes of {max_bytes} hold no block of {block_bytes} bytes")
        self._max_waiting = max(1, MAX_WAITING_BYTES // block_bytes)
        self._lock = threading.Lock()
        self._on_disk: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: dict[bytes, bytes] = {}
        self._writing: bytes | None = None
        """Of those that wait, the one that the thread is at."""
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_for_ever, name="kv-spill", daemon=True)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Raises ValueError when another store has the folder, or it cannot be used."""
        try:
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
            fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ValueError(f"spill_dir {self._folder}: {error.strerror}") from error
        self._stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stack.close()
            raise ValueError(f"spill_dir {self._folder} is another store's") from error
        self._find_files()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """What waits for the disk is written first."""
        self._queue.put(None)
        self._thread.join()
        self._stack.close()

    def __contains__(self, block_hash: bytes) -> bool:
        with self._lock:
            return block_hash in self._on_disk or block_hash in self._waiting

    @property
    def num_bytes(self) -> int:
        return len(self._on_disk) * (self._block_bytes + CHECKSUM_BYTES)

    def put(self, block_hash: bytes, data: memoryview) -> None:
        """Copy a block and write it soon.

        When too many wait, the one that waits longest is dropped: tails are evicted before their
        heads, and are of no use without them.
        """
        with self._lock:
            if block_hash in self._on_disk:
                self._on_disk.move_to_end(block_hash)
                return
            if block_hash in self._waiting:
                return
            if len(self._waiting) >= self._max_waiting:
                self.dropped["disk_too_slow"] += 1
                oldest = next((each for each in self._waiting if each != self._writing), None)
                if oldest is None:
                    return
                del self._waiting[oldest]
            self._waiting[block_hash] = bytes(data)
        self._queue.put(block_hash)

    def read(self, block_hash: bytes) -> bytes | None:
        """A block's bytes; None when it is not here or not what was written. Blocks on the disk."""
        with self._lock:
            if (data := self._waiting.get(block_hash)) is not None:
                return data
            if block_hash not in self._on_disk:
                return None
            self._on_disk.move_to_end(block_hash)
        try:
            data = self._path(block_hash).read_bytes()
        except OSError as error:
            logger.warning("spilled block not read: %s", error)
            self._forget(block_hash, "unreadable")
            return None
        payload = data[CHECKSUM_BYTES:]
        is_sound = len(payload) == self._block_bytes
        if not is_sound or data[:CHECKSUM_BYTES] != _checksum(block_hash, payload):
            logger.warning("spilled block is damaged: %s", self._path(block_hash))
            self._forget(block_hash, "damaged")
            return None
        return payload

    def _find_files(self) -> None:
        """Take over what an earlier store wrote, oldest first; remove unfinished files."""
        found: list[tuple[int, Path]] = []
        for path in self._folder.iterdir():
            if not path.name.endswith((".kv", ".part")):
                continue
            status = path.stat()
            is_whole = status.st_size == self._block_bytes + CHECKSUM_BYTES
            if _NAME.fullmatch(path.name) and is_whole:
                found.append((status.st_mtime_ns, path))
            else:
                path.unlink()
        for _, path in sorted(found):
            self._on_disk[bytes.fromhex(path.stem)] = None
        self._make_room(0)

    def _write_for_ever(self) -> None:
        while (block_hash := self._queue.get()) is not None:
            with self._lock:
                data = self._waiting.get(block_hash)
                self._writing = block_hash
            if data is None:  # dropped since
                continue
            partial = self._folder / f"{block_hash.hex()}.part"
            try:
                self._make_room(1)
                with open(partial, "wb", opener=_private) as file:
                    file.write(_checksum(block_hash, data) + data)
                partial.replace(self._path(block_hash))
                is_written = True
            except OSError as error:
                logger.warning("block not spilled: %s", error)
                with contextlib.suppress(OSError):  # a full disk needs the half that is there
                    partial.unlink(missing_ok=True)
                self.dropped["write_failed"] += 1
                is_written = False
            with self._lock:
                if is_written:
                    self._on_disk[block_hash] = None
                del self._waiting[block_hash]
                self._writing = None

    def _make_room(self, num_new: int) -> None:
        while True:
            with self._lock:
                if len(self._on_disk) + num_new <= self._max_blocks:
                    return
                block_hash, _ = self._on_disk.popitem(last=False)
            self._path(block_hash).unlink(missing_ok=True)

    def _forget(self, block_hash: bytes, reason: str) -> None:
        with self._lock:
            self._on_disk.pop(block_hash, None)
            self.dropped[reason] += 1
        self._path(block_hash).unlink(missing_ok=True)

    def _path(self, block_hash: bytes) -> Path:
        return self._folder / f"{block_hash.hex()}.kv"


def _private(path: str, flags: int) -> int:
    """An opener: what is made can be read by its user only."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _checksum(block_hash: bytes, data: bytes) -> bytes:
    """Of content and name: a file under another block's name is found out."""
    digest = xxhash.xxh3_128(data)
    digest.update(block_hash)
    return digest.digest()
