"""A fingerprint of a checkpoint, so that KV never crosses between different models."""

import mmap
from pathlib import Path

import xxhash

from engine.errors import CheckpointError

_FULL_BYTES = 2 << 30
"""Files up to this size in all are hashed whole."""
_HEAD_BYTES = 8 << 20
_SAMPLE_BYTES = 4096
_SAMPLE_EVERY_BYTES = 256 << 10
_CHUNK_BYTES = 16 << 20


def model_digest(path: Path) -> str:
    """xxh3-128 over weights and config, as 32 hex digits.

    Over 2 GiB only sizes, headers and one page of every 256 KiB are read: each matrix that a
    fine-tune touched is sampled many times, and start-up does not wait for the whole disk.

    Raises:
        CheckpointError: nothing there, or it cannot be read.
    """
    try:
        files = [path] if path.is_file() else _model_files(path)
        if not files:
            raise CheckpointError(f"{path} holds no model files")
        sizes = [file.stat().st_size for file in files]
        is_whole = sum(sizes) <= _FULL_BYTES
        digest = xxhash.xxh3_128()
        for file, size in zip(files, sizes, strict=True):
            name = b"" if path.is_file() else file.name.encode()
            digest.update(len(name).to_bytes(4, "little") + name + size.to_bytes(8, "little"))
            if size:
                _update(digest, file, size, is_whole=is_whole)
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _model_files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.safetensors"), *directory.glob("config.json")])


def _update(digest: xxhash.xxh3_128, file: Path, size: int, *, is_whole: bool) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = size if is_whole else min(size, _HEAD_BYTES)
        for start in range(0, head, _CHUNK_BYTES):
            digest.update(data[start : min(start + _CHUNK_BYTES, head)])
        for start in range(head, size, _SAMPLE_EVERY_BYTES):
            digest.update(data[start : start + _SAMPLE_BYTES])
