"""The memfd of busy flags that the workers of one host inherit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def core_share(num_workers: int) -> Iterator[int | None]:
    """A file descriptor for `--core-share-fd`, closed on exit; its format is the engine's."""
    if find_spec("engine.runtime.core_share") is None:
        yield None
        return
    from engine.runtime.core_share import create_core_share

    fd = create_core_share(num_workers)
    try:
        yield fd
    finally:
        os.close(fd)
