"""Share work that several ranks could do, so that the most loaded one has as little as possible."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """Cells of equal cost, each of which any one of `ranks` can do."""

    num_cells: int
    ranks: tuple[int, ...]


def share(jobs: Sequence[Job]) -> list[dict[int, int]]:
    """How many cells of each job each rank does; the largest load is as small as can be.

    Jobs with least choice are shared out first, each to the least loaded of its ranks. Then cells
    move along chains of jobs, away from the most loaded ranks, until no chain helps: by the
    theorem of maximum flow and minimum cut nothing is left to gain. At last each rank's load is
    packed into few jobs, where that works out, so that few pairs of ranks have to talk.
    """
    loads = dict.fromkeys((rank for job in jobs for rank in job.ranks), 0)
    shares: list[dict[int, int]] = [{} for _ in jobs]
    for index in sorted(range(len(jobs)), key=lambda index: len(jobs[index].ranks)):
        shares[index] = _fill(jobs[index], loads)
        for rank, num_cells in shares[index].items():
            loads[rank] += num_cells
    while any(
        _relieve(rank, jobs, shares, loads) for rank in loads if loads[rank] == max(loads.values())
    ):
        pass
    return _packed(jobs, loads) or shares


def _packed(jobs: Sequence[Job], loads: dict[int, int]) -> list[dict[int, int]] | None:
    """The same loads, each job given to the first ranks with room; None when cells are left."""
    room = dict(loads)
    shares: list[dict[int, int]] = [{} for _ in jobs]
    for index in sorted(range(len(jobs)), key=lambda index: len(jobs[index].ranks)):
        num_left = jobs[index].num_cells
        for rank in jobs[index].ranks:
            num_cells = min(num_left, room[rank])
            if num_cells:
                shares[index][rank] = num_cells
                room[rank] -= num_cells
                num_left -= num_cells
        if num_left:
            return None
    return shares


def _fill(job: Job, loads: dict[int, int]) -> dict[int, int]:
    """Pour the cells over the ranks as water finds its level."""
    ranks = sorted(job.ranks, key=lambda rank: (loads[rank], rank))
    num_filled = next(
        (
            count
            for count in range(1, len(ranks))
            if sum(loads[ranks[count]] - loads[rank] for rank in ranks[:count]) >= job.num_cells
        ),
        len(ranks),
    )
    filled = ranks[:num_filled]
    level, extra = divmod(job.num_cells + sum(loads[rank] for rank in filled), num_filled)
    return {rank: level + (place < extra) - loads[rank] for place, rank in enumerate(filled)}


def _relieve(
    start: int, jobs: Sequence[Job], shares: list[dict[int, int]], loads: dict[int, int]
) -> bool:
    """Move cells from `start` to the nearest rank with two less; False when there is none."""
    came_from: dict[int, tuple[int, int]] = {}
    queue = deque([start])
    while queue:
        rank = queue.popleft()
        if loads[rank] <= loads[start] - 2:
            _move(start, rank, came_from, shares, loads)
            return True
        for index, job in enumerate(jobs):
            if shares[index].get(rank, 0):
                for other in job.ranks:
                    if other != start and other not in came_from:
                        came_from[other] = rank, index
                        queue.append(other)
    return False


def _move(
    start: int,
    end: int,
    came_from: dict[int, tuple[int, int]],
    shares: list[dict[int, int]],
    loads: dict[int, int],
) -> None:
    steps = []
    rank = end
    while rank != start:
        giver, index = came_from[rank]
        steps.append((giver, rank, index))
        rank = giver
    half = (loads[start] - loads[end]) // 2
    num_cells = min(half, *(shares[index][giver] for giver, _, index in steps))
    for giver, taker, index in steps:
        shares[index][giver] -= num_cells
        shares[index][taker] = shares[index].get(taker, 0) + num_cells
    loads[start] -= num_cells
    loads[end] += num_cells
