"""What this process holds open, to compare before and after."""

import gc
import threading
from collections import Counter
from pathlib import Path


def open_things() -> Counter[str]:
    """Descriptors by what they refer to, mapped memory files, and threads."""
    gc.collect()  # what earlier tests dropped is not to go away in between
    found = Counter(f"thread {thread.ident} {thread.name}" for thread in threading.enumerate())
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[str(path.readlink())] += 1
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    maps = Path("/proc/self/maps").read_text()
    found.update(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/memfd:" in line)
    return Counter({name: n for name, n in found.items() if not name.startswith("/proc/")})
