"""Says what is missing before a virtual environment can be made; the standard library only."""

import importlib.util
import platform
import sys

OLDEST = (3, 11)


def complaint(version: tuple[int, int], *, has_ensurepip: bool) -> str:
    """What to do first; empty when nothing is missing."""
    if version < OLDEST:
        found, needed = (".".join(map(str, pair)) for pair in (version, OLDEST))
        return (
            f"Isthmus needs Python {needed} or newer, and this is {found}:"
            " name another with `make PYTHON=python3.12 ...`"
        )
    if not has_ensurepip:
        return (
            "Python's venv module is incomplete on this machine. On Debian:"
            " `apt-get install python3-venv`"
        )
    return ""


def main() -> None:
    found = importlib.util.find_spec("ensurepip") is not None
    if text := complaint(sys.version_info[:2], has_ensurepip=found):
        sys.exit(text)
    if platform.system() != "Linux":
        sys.exit(f"Isthmus runs on Linux, and this is {platform.system()}")


if __name__ == "__main__":
    main()
