"""Tokens by expert, kept from one run of a worker to the next, and the placement they ask for."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from engine.checkpoint.digest import model_digest
from engine.checkpoint.form import ExpertsForm
from engine.config import EngineConfig
from engine.parallel.axes import AxisGroup
from engine.parallel.expert_placement import ExpertPlacement
from engine.runtime.rank_message import ExpertTokens

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 26


class ExpertCounts(msgspec.Struct, frozen=True):
    """What the file holds, as JSON."""

    model_digest: str
    tokens: ExpertTokens

    def check(self, digest: str, experts: ExpertsForm, source: Path) -> None:
        """Raises ValueError unless they were counted for this model."""
        is_whole = self.tokens.keys() == experts.layers and all(
            len(counts) == experts.num_experts and min(counts) >= 0
            for counts in self.tokens.values()
        )
        if self.model_digest != digest or not is_whole:
            raise ValueError(
                f"{source} has the tokens of {len(self.tokens)} layers' experts, counted for model "
                f"{self.model_digest}, not for {digest} with {len(experts.layers)} layers of "
                f"{experts.num_experts}; remove it, or name another file"
            )


def read_counts(path: Path, *, digest: str, experts: ExpertsForm) -> ExpertTokens:
    """By layer.

    Raises:
        ValueError: it cannot be read, or was counted for another model.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} is larger than {_MAX_BYTES} bytes")
        counts = msgspec.json.decode(path.read_bytes(), type=ExpertCounts)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path} cannot be read as tokens by expert: {error}") from error
    counts.check(digest, experts, path)
    return counts.tokens


def write_counts(path: Path, ranks: Sequence[ExpertTokens], *, digest: str) -> None:
    """Replace the file by the sum over `ranks`; one that counted nothing leaves it as it is."""
    tokens: ExpertTokens = {}
    for each in ranks:
        for layer, counts in each.items():
            before = tokens.get(layer, [0] * len(counts))
            tokens[layer] = [a + b for a, b in zip(before, counts, strict=True)]
    if not any(map(any, tokens.values())):
        return
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_bytes(msgspec.json.encode(ExpertCounts(digest, tokens)))
        new.replace(path)
    except OSError as error:
        logger.warning("tokens by expert are not kept: %s", error)


def wanted_placements(
    config: EngineConfig, experts: ExpertsForm, model_path: Path, *, num_ranks: int
) -> dict[int, ExpertPlacement]:
    """Where rank 0 wants the experts of each layer on `num_ranks` ranks; empty: evenly.

    Raises:
        ValueError: the counts cannot be used, or there are more ranks than experts.
    """
    path = config.expert_counts
    if path is None or not path.exists():
        return {}
    tokens = read_counts(path, digest=model_digest(model_path), experts=experts)
    logger.info("experts placed by %s, layers=%d", path, len(tokens))
    return {
        layer: ExpertPlacement.balanced(counts, num_ranks, num_spare=config.num_spare_experts)
        for layer, counts in tokens.items()
    }


def share_placements(
    placements: Mapping[int, ExpertPlacement] | None, world: AxisGroup
) -> dict[int, ExpertPlacement]:
    """Every rank of the worker returns what rank 0 passes; the others pass None."""
    told = None
    if placements is not None:
        told = msgspec.json.encode({layer: each.experts_of for layer, each in placements.items()})
    heard = world.broadcast_bytes(told, max_bytes=_MAX_BYTES, timeout_s=math.inf)
    found = msgspec.json.decode(heard, type=dict[int, tuple[tuple[int, ...], ...]])
    return {layer: ExpertPlacement(experts_of) for layer, experts_of in found.items()}
