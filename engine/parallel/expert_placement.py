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
