"""Which rank of a sending group writes what into which rank of a receiving group.

A sequence's KV is a box: layers x heads x tokens. Each rank holds a sub-box, and a plan is the
list of intersections. It depends on the two layouts only, so it is made once for each pair of
workers; tokens are cut to blocks at each push (`blocks.slot_ranges`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.kv_cache.layout import KvLayout
from kv_transfer.balance import Job, share
from kv_transfer.group_layout import GroupLayout


class Box(NamedTuple):
    """Layers [first_layer, first_layer + num_layers) x heads of one rank's pool, as it counts."""

    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int

    @property
    def num_cells(self) -> int:
        """Heads of layers."""
        return self.num_layers * self.num_heads

    def is_inside(self, layout: KvLayout) -> bool:
        """Not empty, and within a pool of this layout."""
        return (
            self.num_cells > 0
            and self.first_layer + self.num_layers <= layout.num_layers
            and self.first_head + self.num_heads <= layout.num_kv_heads
        )


class Transfer(NamedTuple):
    """The same layers and heads as two ranks hold them; both boxes have one shape."""

    sender_rank: int
    receiver_rank: int
    source: Box
    target: Box


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours in a receiver's pool that are neighbours in the pool of every holder, too."""

    first: int
    length: int
    places: dict[int, int]
    """Where the run begins, by sender rank."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A layer run x a head run of one receiver rank, and the ranks that can send it."""

    receiver_rank: int
    layers: _Run
    heads: _Run
    sender_ranks: tuple[int, ...]


def reshard_plan(sender: GroupLayout, receiver: GroupLayout) -> tuple[Transfer, ...]:
    """Everything that one token needs to stand on every rank of the receiver; of one data shard.

    For each token shard of the sender, each head of each layer of each receiver rank is written
    by exactly one transfer. Where several ranks of a shard hold it, the work is shared so that
    the busiest one sends as few bytes as can be.

    Returns:
        Sorted by sender rank, then receiver rank.

    Raises:
        ValueError: the layouts have different layers or heads, or the receiver's tokens are split.
    """
    assert sender.num_data_shards == receiver.num_data_shards == 1, "a plan is for one data shard"
    shapes = [(g.full.num_layers, g.full.num_kv_heads) for g in (sender, receiver)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"layers and KV heads differ: {shapes[0]} there, {shapes[1]} here")
    if receiver.num_token_shards != 1:
        raise ValueError("a receiver's ranks each hold all tokens of a sequence")
    transfers: list[Transfer] = []
    for shard in range(sender.num_token_shards):
        pieces = list(_pieces(sender, receiver, shard))
        jobs = [Job(p.layers.length * p.heads.length, p.sender_ranks) for p in pieces]
        for piece, shares in zip(pieces, share(jobs), strict=True):
            transfers.extend(_transfers(piece, shares))
    return tuple(sorted(transfers, key=lambda t: (t.sender_rank, t.receiver_rank)))


def num_handover_bytes(receiver: GroupLayout, num_tokens: int) -> int:
    """What a handover of `num_tokens` uncached tokens moves, whatever the sender's layout."""
    return num_tokens * receiver.bytes_per_token


def _pieces(sender: GroupLayout, receiver: GroupLayout, shard: int) -> Iterator[_Piece]:
    boxes = {rank: box for rank, box in enumerate(sender.boxes) if box.token_shard == shard}
    layers_of = {rank: box.layers for rank, box in boxes.items()}
    heads_of = {rank: box.kv_heads for rank, box in boxes.items()}
    for receiver_rank, box in enumerate(receiver.boxes):
        head_runs = _runs(box.kv_heads, heads_of)
        for layers in _runs(box.layers, layers_of):
            for heads in head_runs:
                ranks = tuple(rank for rank in layers.places if rank in heads.places)
                yield _Piece(receiver_rank, layers, heads, ranks)


def _runs(wanted: Sequence[int], held_by: dict[int, tuple[int, ...]]) -> list[_Run]:
    """Cut what a receiver rank holds where its holders, or their order of it, change."""
    place_of = {
        rank: {index: place for place, index in enumerate(held)} for rank, held in held_by.items()
    }
    runs: list[_Run] = []
    for first, index in enumerate(wanted):
        places = {rank: place[index] for rank, place in place_of.items() if index in place}
        if runs:
            last = runs[-1]
            expected = {rank: place + last.length for rank, place in last.places.items()}
            if places == expected:
                runs[-1] = _Run(last.first, last.length + 1, last.places)
                continue
        runs.append(_Run(first, 1, places))
    return runs


def _transfers(piece: _Piece, shares: dict[int, int]) -> Iterator[Transfer]:
    """Deal the cells of a piece out in order, layer by layer."""
    first = 0
    for rank, num_cells in sorted(shares.items()):
        for layer, num_layers, head, num_heads in _cut(first, num_cells, piece.heads.length):
            yield Transfer(
                rank,
                piece.receiver_rank,
                Box(
                    piece.layers.places[rank] + layer,
                    num_layers,
                    piece.heads.places[rank] + head,
                    num_heads,
                ),
                Box(piece.layers.first + layer, num_layers, piece.heads.first + head, num_heads),
            )
        first += num_cells


def _cut(first: int, num_cells: int, num_heads: int) -> Iterator[tuple[int, int, int, int]]:
    """Cells [first, first + num_cells), counted layer by layer, as boxes.

    Yields:
        First layer, layers, first head, heads.
    """
    end = first + num_cells
    while first < end:
        layer, head = divmod(first, num_heads)
        if head == 0 and end - first >= num_heads:
            num_layers = (end - first) // num_heads
            yield layer, num_layers, 0, num_heads
            first += num_layers * num_heads
        else:
            count = min(num_heads - head, end - first)
            yield layer, 1, head, count
            first += count


def of_layers(transfers: Sequence[Transfer], layers: range) -> list[Transfer]:
    """What of `transfers` has these layers of the sender's pool."""
    some = []
    for transfer in transfers:
        source, target = transfer.source, transfer.target
        first = max(source.first_layer, layers.start)
        num_layers = min(source.first_layer + source.num_layers, layers.stop) - first
        if num_layers > 0:
            target_first = target.first_layer + first - source.first_layer
            some.append(
                transfer._replace(
                    source=source._replace(first_layer=first, num_layers=num_layers),
                    target=target._replace(first_layer=target_first, num_layers=num_layers),
                )
            )
    return some
