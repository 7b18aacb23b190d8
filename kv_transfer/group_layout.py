"""Which layers and KV heads each rank of a worker holds. No torch, no IO."""

from dataclasses import dataclass, replace

from engine.kv_cache.layout import KvLayout
from engine.parallel.layout import MAX_RANKS

MAX_BOX_ENTRIES = 1 << 17
"""Layers and heads listed by all ranks of a group together: bounds what a peer makes us work."""


@dataclass(frozen=True, slots=True)
class RankBox:
    """What one rank's pool holds; a place in its pool is a position in these tuples.

    Several ranks may hold the same head: a replicated one.
    """

    layers: tuple[int, ...]
    """Of the whole model, ascending: one range, or several with interleaved pipeline stages."""
    kv_heads: tuple[int, ...]
    """Of the whole model, in the pool's order."""
    token_shard: int = 0
    """Ranks that split a prompt by tokens (sp) hold different shards of it. Which tokens are
    whose is said with each push. Ranks of one shard hold the same tokens."""
    data_shard: int = 0
    """Ranks that split requests (dp) hold different sequences. A sequence's block ids name its
    shard: see `engine.scheduling.data_shard`."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """The KV of a worker, spread over its ranks. Ranks of a data shard use the same block ids.

    Raises:
        ValueError: a box is out of bounds, the boxes do not make up the whole, or data shards are
            not alike.
    """

    full: KvLayout
    """The pool that one rank would have that held everything."""
    boxes: tuple[RankBox, ...]
    """By rank."""

    @classmethod
    def single(cls, layout: KvLayout) -> "GroupLayout":
        """One rank that holds everything."""
        box = RankBox(tuple(range(layout.num_layers)), tuple(range(layout.num_kv_heads)))
        return cls(layout, (box,))

    def __post_init__(self) -> None:
        if not 1 <= len(self.boxes) <= MAX_RANKS:
            raise ValueError(f"a group has 1 to {MAX_RANKS} ranks, got {len(self.boxes)}")
        num_entries = sum(len(box.layers) + len(box.kv_heads) for box in self.boxes)
        if num_entries > MAX_BOX_ENTRIES:
            raise ValueError(f"ranks list {num_entries} layers and heads, above {MAX_BOX_ENTRIES}")
        for rank, box in enumerate(self.boxes):
            self._check_box(rank, box)
        first, *others = [self._boxes_of(shard) for shard in range(self.num_data_shards)]
        if any(boxes != first for boxes in others):
            raise ValueError("the data shards of a group must hold the same layers and heads")
        for shard in range(self.num_token_shards):
            self._check_whole(shard)

    @property
    def num_ranks(self) -> int:
        return len(self.boxes)

    @property
    def num_token_shards(self) -> int:
        return 1 + max(box.token_shard for box in self.boxes)

    @property
    def num_data_shards(self) -> int:
        return 1 + max(box.data_shard for box in self.boxes)

    @property
    def one_shard(self) -> "GroupLayout":
        """What each data shard looks like; its ranks are those of `shard_ranks`, in order."""
        return self if self.num_data_shards == 1 else GroupLayout(self.full, self._boxes_of(0))

    def shard_ranks(self, data_shard: int) -> tuple[int, ...]:
        """The ranks of a data shard, ascending."""
        return tuple(rank for rank, box in enumerate(self.boxes) if box.data_shard == data_shard)

    @property
    def block_size_tokens(self) -> int:
        return self.full.block_size_tokens

    @property
    def bytes_per_token(self) -> int:
        """Over the ranks of a data shard: what a handover into this group moves for each token."""
        num_cells = sum(len(box.layers) * len(box.kv_heads) for box in self._boxes_of(0))
        return num_cells * self.full.bytes_per_cell

    def rank_layout(self, rank: int) -> KvLayout:
        """The shape of one rank's pool."""
        box = self.boxes[rank]
        return replace(self.full, num_layers=len(box.layers), num_kv_heads=len(box.kv_heads))

    def num_blocks_for(self, num_tokens: int) -> int:
        return self.full.num_blocks_for(num_tokens)

    def _check_box(self, rank: int, box: RankBox) -> None:
        for name, indices, bound in (
            ("layers", box.layers, self.full.num_layers),
            ("KV heads", box.kv_heads, self.full.num_kv_heads),
        ):
            is_sound = len(indices) == len(set(indices)) and all(0 <= i < bound for i in indices)
            if not indices or not is_sound:
                raise ValueError(f"rank {rank} must hold distinct {name} of [0, {bound})")
        if list(box.layers) != sorted(box.layers):
            raise ValueError(f"the layers of rank {rank} are not in ascending order")
        if not 0 <= box.token_shard < len(self.boxes):
            raise ValueError(f"token shard {box.token_shard} in a group of {len(self.boxes)} ranks")
        if not 0 <= box.data_shard < len(self.boxes):
            raise ValueError(f"data shard {box.data_shard} in a group of {len(self.boxes)} ranks")

    def _boxes_of(self, data_shard: int) -> tuple[RankBox, ...]:
        """As the boxes of a group that has one data shard."""
        return tuple(
            replace(box, data_shard=0) for box in self.boxes if box.data_shard == data_shard
        )

    def _check_whole(self, shard: int) -> None:
        """The ranks of a shard hold every head of every layer."""
        heads_of_layer = [0] * self.full.num_layers
        for box in self.boxes:
            if (box.data_shard, box.token_shard) == (0, shard):
                mask = sum(1 << head for head in box.kv_heads)
                for layer in box.layers:
                    heads_of_layer[layer] |= mask
        whole = (1 << self.full.num_kv_heads) - 1
        for layer, heads in enumerate(heads_of_layer):
            if heads != whole:
                missing = next(h for h in range(self.full.num_kv_heads) if not heads >> h & 1)
                raise ValueError(
                    f"no rank of token shard {shard} holds KV head {missing} of layer {layer}"
                )
