"""Exec wrapper: `child.py PARENT_PID COMMAND...` runs COMMAND, which dies with its parent.

The standard library only: it is started as `python -S -E child.py`, where no package is found.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def become(parent_pid: int, argv: list[str]) -> None:
    """Replace this process by `argv`, which the kernel kills as soon as its parent is gone.

    The death signal survives exec. A parent that died before prctl() sends none, so its pid is
    compared afterwards: an orphan has another parent by then and leaves at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)
    os.setsid()  # Ctrl-C in the terminal reaches only the launcher, which stops us in order
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    try:
        become(int(sys.argv[1]), sys.argv[2:])
    except OSError as error:
        sys.stderr.write(f"cannot start {sys.argv[2]}: {error}\n")
        sys.exit(127)
