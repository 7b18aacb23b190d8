"""`isthmus chat`: a conversation in the terminal with a running mesh."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from grpc import aio

from deploy.answer import Answer, open_channel, split_line, stream_answer
from deploy.progress import console
from engine.errors import IsthmusError
from protos.isthmus.v1 import sampling_pb2

_HELP = "/reset forgets the conversation, /system TEXT sets a system message, /quit leaves"


@dataclass(slots=True)
class Conversation:
    """What was said so far; a turn that failed is not kept."""

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def asking(self, question: str) -> list[tuple[str, str]]:
        """The messages to send for this question; the conversation is unchanged."""
        system = [("system", self.system)] if self.system else []
        return [*system, *self.turns, ("user", question)]

    def answered(self, question: str, answer: str) -> None:
        self.turns += [("user", question), ("assistant", answer)]

    def command(self, line: str) -> str | None:
        """Obey a line that starts with a slash; returns what to say, None to leave."""
        name, _, argument = line.partition(" ")
        match name:
            case "/quit" | "/exit" | "/q":
                return None
            case "/reset":
                self.turns.clear()
                return "The conversation starts anew."
            case "/system":
                self.system = argument.strip()
                return "System message set." if self.system else "System message removed."
            case "/help":
                return _HELP
            case _:
                return f"{name} is not a command: {_HELP}"


def chat(address: str, *, system: str, max_tokens: int, temperature: float) -> int:
    """Talk until /quit or end of input; Ctrl-C stops an answer, and at the prompt leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() line editing and its history
    sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature)
    conversation = Conversation(system=system)
    console.print(f"Chat with {address}. {_HELP}; Ctrl-C stops an answer.", style="dim")
    with asyncio.Runner() as runner:
        channel = runner.run(_opened(address))
        try:
            _converse(runner, channel, conversation, sampling)
        finally:
            runner.run(channel.close())
    return 0


async def _opened(address: str) -> aio.Channel:
    return open_channel(address)  # made on the loop that will use it


def _converse(
    runner: asyncio.Runner,
    channel: aio.Channel,
    conversation: Conversation,
    sampling: sampling_pb2.SamplingParams,
) -> None:
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            reply = conversation.command(line)
            if reply is None:
                return
            console.print(reply, style="dim", markup=False)
        elif line:
            _take_turn(runner, channel, conversation, line, sampling)


def _read_line() -> str | None:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _take_turn(
    runner: asyncio.Runner,
    channel: aio.Channel,
    conversation: Conversation,
    question: str,
    sampling: sampling_pb2.SamplingParams,
) -> None:
    heard: list[str] = []
    messages = conversation.asking(question)
    try:
        answer: Answer | None = runner.run(
            stream_answer(channel, messages, sampling=sampling, on_text=_heard_by(heard))
        )
    except KeyboardInterrupt:
        answer = None
    except IsthmusError as error:
        console.print(str(error), style="red", markup=False)
        return
    print(flush=True)
    closing = split_line(answer) if answer else "stopped"
    console.print(closing, style="dim", markup=False, soft_wrap=True)
    if heard:
        conversation.answered(question, "".join(heard))


def _heard_by(pieces: list[str]) -> Callable[[str], None]:
    def on_text(text: str) -> None:
        pieces.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    return on_text
