"""What a person sees of a fetch and of a start, on a terminal."""

import io

import pytest
from rich.console import Console

from deploy import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress, "console", console)
    return output


def test_a_fetch_is_a_bar_with_bytes(terminal: io.StringIO) -> None:
    with progress.byte_progress() as report:
        report("Fetching the demo model", 0, 0)
        report("Fetching the demo model", 49_000_000, 98_000_000)
    assert "Fetching the demo model" in terminal.getvalue()
    assert "49.0/98.0 MB" in terminal.getvalue()


def test_with_nothing_to_fetch_nothing_is_drawn(terminal: io.StringIO) -> None:
    with progress.byte_progress():
        pass
    assert terminal.getvalue() == ""


def test_a_start_is_a_line_for_each_process(terminal: io.StringIO) -> None:
    with progress.start_progress(verbose=False) as events:
        events.on_started("prefill-0")
        events.on_started("gateway")
        events.on_ready("gateway")
        events.on_output("gateway", "what it logs")
    shown = terminal.getvalue()
    assert "starting prefill-0" in shown
    assert "gateway" in shown
    assert "what it logs" not in shown
