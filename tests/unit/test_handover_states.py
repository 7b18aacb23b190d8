"""The tables of docs/handover.md are those that the code moves through."""

import re
from pathlib import Path

import pytest

from kv_transfer.states import (
    HANDOVERS,
    LEASES,
    HandoverEvent,
    HandoverState,
    LeaseEvent,
    LeaseState,
)

PAGE = Path(__file__).parents[2] / "docs" / "handover.md"
LEASE_PART = "## A lease, at the receiver"
HANDOVER_PART = "## A handover, at the sender"
MACHINES = pytest.mark.parametrize(
    ("title", "table", "states", "events", "first"),
    [
        (LEASE_PART, LEASES, LeaseState, LeaseEvent, LeaseState.WAITING),
        (HANDOVER_PART, HANDOVERS, HandoverState, HandoverEvent, HandoverState.OPEN),
    ],
    ids=["lease", "handover"],
)


def part(title: str) -> str:
    _, _, rest = PAGE.read_text().partition(f"{title}\n")
    assert rest, f"{PAGE.name} has no part {title!r}"
    return rest.partition("\n## ")[0]


def rows_of(text: str) -> list[tuple[str, ...]]:
    """Rows of all tables of a part, backquotes taken off; the heads are left out."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip().strip("`") for cell in line.split("|")[1:-1]) for line in lines]


@MACHINES
def test_the_page_shows_every_move_and_no_other(title, table, states, events, first):
    shown = [row for row in rows_of(part(title)) if len(row) == 3]
    assert len(shown) == len(set(shown))
    assert set(shown) == {(str(a), str(b), str(c)) for a, b, c in table.rows}


@MACHINES
def test_the_page_says_of_every_state_who_owns_the_blocks(title, table, states, events, first):
    described = [row[0] for row in rows_of(part(title)) if len(row) == 4]
    assert described == [str(state) for state in states]


@MACHINES
def test_every_state_is_reached_and_every_event_happens(title, table, states, events, first):
    reached = {first}
    for _ in states:
        reached |= {after for before, _, after in table.rows if before in reached}
    assert reached == set(states)
    assert {event for _, event, _ in table.rows} == set(events)


def test_a_lease_ends_committed_or_freed() -> None:
    assert {state for state in LeaseState if LEASES.is_final(state)} == {
        LeaseState.COMMITTED,
        LeaseState.FREED,
    }


def test_a_handover_ends_closed() -> None:
    assert {state for state in HandoverState if HANDOVERS.is_final(state)} == {HandoverState.CLOSED}


def test_whatever_the_sender_or_the_gateway_asks_of_a_granted_lease_has_an_answer() -> None:
    known = {(state, event) for state, event, _ in LEASES.rows}
    waits = {  # taken up again, as another state's, when the commit has ended
        (LeaseState.COMMITTING, LeaseEvent.RELEASED),
        (LeaseState.COMMITTING, LeaseEvent.ABORTED),
    }
    for event in (
        LeaseEvent.RENEWED,
        LeaseEvent.COMMIT_ASKED,
        LeaseEvent.RELEASED,
        LeaseEvent.ABORTED,
    ):
        for state in set(LeaseState) - {LeaseState.WAITING}:
            assert (state, event) in known | waits


def test_a_move_that_has_no_row_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="lease 7 cannot be fenced when it is reserved"):
        LEASES.after(LeaseState.RESERVED, LeaseEvent.FENCED, "lease 7")


def test_names_in_the_durations_are_names_in_the_code() -> None:
    sources = "\n".join(path.read_text() for path in (PAGE.parents[1] / "kv_transfer").glob("*.py"))
    durations = re.findall(r"`((?:[a-z]+_)+s|[A-Z_]+_S)`", PAGE.read_text())
    assert len(set(durations)) >= 6
    for name in durations:
        assert re.search(rf"\b{name}\b", sources), name
