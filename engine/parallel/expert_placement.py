"""Which rank of an expert axis holds which experts. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.parallel.spread import spread


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of one layer by rank of the axis. Hot ones may stand on several ranks.

    A place is one expert on one rank; places are counted rank by rank.

    Raises:
        ValueError: an expert stands nowhere, or twice on one rank, or a rank has none.
    """

    experts_of: tuple[tuple[int, ...], ...]
    """Ids on each rank, ascending."""

    def __post_init__(self) -> None:
        if not all(self.experts_of):
            raise ValueError("a rank has no expert")
        for rank, experts in enumerate(self.experts_of):
            if list(experts) != sorted(set(experts)):
                raise ValueError(f"the experts of rank {rank} are not ascending: {experts}")
        found = {expert for experts in self.experts_of for expert in experts}
        if found != set(range(len(found))):
            missing = min(set(range(max(found))) - found, default=min(found))
            raise ValueError(f"expert {missing} stands on no rank")

    @classmethod
    def even(cls, num_experts: int, num_ranks: int) -> "ExpertPlacement":
        """Neighbours together, and no rank with more than one expert more than another.

        Raises:
            ValueError: there are more ranks than experts.
        """
        spans = spread(num_experts, num_ranks, what="the number of experts")
        return cls(tuple(tuple(span) for span in spans))

    @classmethod
    def balanced(
        cls, num_tokens: Sequence[int], num_ranks: int, *, num_spare: int
    ) -> "ExpertPlacement":
        """Ranks have alike to do if tokens come as they came; hot experts stand on several.

        Greedy: each spare place goes to the expert with the most tokens for each of its replicas.
        Then, heaviest first, each expert goes to as many ranks as it has replicas: those with the
        least to do that have a place left.

        Args:
            num_tokens: measured, of each expert.
            num_ranks: of the axis.
            num_spare: places on each rank above those of `even`.

        Raises:
            ValueError: there are more ranks than experts.

        Source: DeepSeek-AI 2024, "DeepSeek-V3", section 3.4 (redundant experts).
        """
        num_experts = len(num_tokens)
        num_left = [count + num_spare for count in cls.even(num_experts, num_ranks).num_places]
        replicas = [1] * num_experts
        for _ in range(min(num_spare * num_ranks, num_experts * (num_ranks - 1))):
            growing = [e for e in range(num_experts) if replicas[e] < num_ranks]
            hottest = max(growing, key=lambda e: num_tokens[e] / replicas[e])
            replicas[hottest] += 1
        experts_of: list[list[int]] = [[] for _ in range(num_ranks)]
        load = [0.0] * num_ranks
        for expert in sorted(
            range(num_experts), key=lambda e: num_tokens[e] / replicas[e], reverse=True
        ):
            open_ranks = [rank for rank in range(num_ranks) if num_left[rank]]
            open_ranks.sort(key=lambda rank: (load[rank], len(experts_of[rank])))
            for rank in open_ranks[: replicas[expert]]:
                experts_of[rank].append(expert)
                num_left[rank] -= 1
                load[rank] += num_tokens[expert] / replicas[expert]
        return cls(tuple(tuple(sorted(experts)) for experts in experts_of))

    @cached_property
    def num_places(self) -> tuple[int, ...]:
        """On each rank."""
        return tuple(map(len, self.experts_of))

    @cached_property
    def places_of(self) -> tuple[Sequence[int], ...]:
        """Where each expert stands."""
        places: dict[int, list[int]] = {}
        experts = (expert for experts in self.experts_of for expert in experts)
        for place, expert in enumerate(experts):
            places.setdefault(expert, []).append(place)
        return tuple(places[expert] for expert in range(len(places)))

    @cached_property
    def is_plain(self) -> bool:
        """Each expert's place has the expert's number."""
        return all(list(places) == [expert] for expert, places in enumerate(self.places_of))
