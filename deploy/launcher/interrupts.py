"""Ctrl-C, SIGTERM and a closed terminal, made into an orderly end."""

import asyncio
import signal
from collections.abc import Callable, Coroutine

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def interruptible(main: Callable[[asyncio.Event], Coroutine[object, object, int]]) -> int:
    """Run `main(hurry)`; the first signal cancels it, a later one sets `hurry`.

    Returns:
        The status that `main` returned, or 128 + the number of the signal that ended it.
    """
    loop = asyncio.get_running_loop()
    hurry = asyncio.Event()
    received: list[signal.Signals] = []
    task = asyncio.create_task(main(hurry), name="main")

    def interrupt(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
        else:
            hurry.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
