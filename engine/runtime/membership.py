"""How a process becomes a rank of its worker, or stays the only one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.read import read_config
from engine.config import CollectivesConfig, EngineConfig
from engine.parallel.environment import RankEnvironment
from engine.parallel.fit import check_layout_fits
from engine.parallel.rank_group import RankGroup, join_group
from engine.runtime.followers import Followers
from engine.runtime.leader import Leader
from engine.runtime.rank_message import beat_interval_s
from engine.runtime.rank_socket import accept_followers, connect_to_leader


@dataclass(frozen=True, slots=True)
class Membership:
    """One rank among several, connected: the leader has followers, a follower has its leader."""

    group: RankGroup
    config: CollectivesConfig
    followers: Followers | None = None
    leader: Leader | None = None

    @property
    def rank(self) -> int:
        return self.group.rank


def join_worker(
    model_path: Path,
    config: EngineConfig,
    collectives: CollectivesConfig,
    environment: Mapping[str, str],
    *,
    device: torch.device | None = None,
) -> Membership | None:
    """Meet the other ranks that `config.parallel` asks for; None where there is one rank.

    Args:
        model_path: what will be split.
        config: the same on every rank.
        collectives: the same on every rank.
        environment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
        device: where the tensors will be.

    Raises:
        ValueError: the environment has another number of ranks than the layout, or the layout does
            not fit the model; the text has the numbers.
        RankGroupError: a rank did not come.
    """
    layout = config.parallel
    place = RankEnvironment.read(environment)
    if place is not None:
        place.check_layout(layout)
    check_layout_fits(read_config(model_path), layout)
    group = join_group(layout, place, config=collectives, device=device)
    if place is None or layout.num_ranks == 1:
        return None
    return connect_ranks(group, collectives, host=place.master_address)


def connect_ranks(group: RankGroup, config: CollectivesConfig, *, host: str) -> Membership:
    """Open the sockets for step plans between rank 0, on `host`, and the others."""
    world, send_timeout_s = group.axes.world, config.collective_timeout_s
    if group.rank == 0:
        sockets = accept_followers(
            world, host, timeout_s=config.join_timeout_s, send_timeout_s=send_timeout_s
        )
        return Membership(group, config, followers=Followers(sockets, timeout_s=send_timeout_s))
    connection = connect_to_leader(
        world, timeout_s=config.join_timeout_s, send_timeout_s=send_timeout_s
    )
    leader = Leader(connection, beat_s=beat_interval_s(send_timeout_s))
    leader.call_when_gone(lambda: group.abort("rank 0 is gone"))
    return Membership(group, config, leader=leader)


def pool_addresses(membership: Membership | None) -> list[str]:
    """Rank 0, after `build_engine`: where the other ranks' pools are served, in rank order.

    Raises:
        RankGroupError: a rank died, or does not serve in time.
    """
    if membership is None or membership.followers is None:
        return []
    return membership.followers.addresses(timeout_s=membership.config.join_timeout_s)
