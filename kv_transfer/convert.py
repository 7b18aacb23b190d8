"""Protobuf messages of the handover to and from the package's own values."""

from engine.errors import InvalidRequestError
from engine.kv_cache.layout import KvLayout
from engine.scheduling.block_hash import HASH_BYTES
from kv_transfer.config import address_from, join_address
from kv_transfer.group_layout import GroupLayout, RankBox
from kv_transfer.lease import Lease
from kv_transfer.offer import NixlOffer, Offer, RankOffer, ShmOffer, TcpOffer
from protos.isthmus.v1 import kv_rank_pb2 as rank_pb
from protos.isthmus.v1 import kv_transfer_pb2 as pb


def layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size_tokens=layout.block_size_tokens,
        dtype=layout.dtype,
        num_parts=layout.num_parts,
    )


def layout_from(message: pb.KvLayout) -> KvLayout:
    """Raises InvalidRequestError when the fields cannot describe a pool."""
    try:
        return KvLayout(
            num_layers=message.num_layers,
            num_kv_heads=message.num_kv_heads,
            head_dim=message.head_dim,
            block_size_tokens=message.block_size_tokens,
            dtype=message.dtype,
            num_parts=message.num_parts,
        )
    except ValueError as error:
        raise InvalidRequestError(f"KV layout: {error}") from error


def offer_to_pb(offer: Offer) -> pb.HandshakeResponse:
    return pb.HandshakeResponse(
        receiver_id=offer.receiver_id,
        epoch=offer.epoch,
        layout=layout_to_pb(offer.layout.full),
        num_blocks=offer.num_blocks,
        ranks=map(rank_to_pb, offer.layout.boxes, offer.ranks),
    )


def offer_from(message: pb.HandshakeResponse) -> Offer:
    """Raises InvalidRequestError when it makes no sense; nothing in it is trusted yet."""
    full = layout_from(message.layout)
    try:
        layout = GroupLayout(full, tuple(_box_from(rank) for rank in message.ranks))
    except ValueError as error:
        raise InvalidRequestError(f"ranks of {message.receiver_id}: {error}") from error
    return Offer(
        receiver_id=message.receiver_id,
        epoch=message.epoch,
        layout=layout,
        num_blocks=message.num_blocks,
        ranks=tuple(rank_offer_from(rank) for rank in message.ranks),
    )


def rank_to_pb(box: RankBox, offer: RankOffer) -> pb.KvRank:
    return pb.KvRank(
        layers=box.layers,
        kv_heads=box.kv_heads,
        data_shard=box.data_shard,
        shm=shm_to_pb(offer),
        tcp=tcp_to_pb(offer),
        nixl=nixl_to_pb(offer),
    )


def rank_offer_from(
    message: pb.KvRank | rank_pb.StartReceivingResponse | rank_pb.KvTarget,
) -> RankOffer:
    """Raises InvalidRequestError for a data address that is none."""
    shm, tcp = message.shm, message.tcp
    return RankOffer(
        shm=ShmOffer(shm.path, shm.num_bytes, shm.nonce) if message.HasField("shm") else None,
        tcp=_tcp_from(tcp) if message.HasField("tcp") else None,
        nixl=_nixl_from(message.nixl) if message.HasField("nixl") else None,
    )


def _box_from(message: pb.KvRank) -> RankBox:
    layers, kv_heads = tuple(message.layers), tuple(message.kv_heads)
    return RankBox(layers, kv_heads, data_shard=message.data_shard)


def lease_to_pb(lease: Lease) -> pb.ReserveResponse:
    return pb.ReserveResponse(
        lease_id=lease.lease_id,
        block_ids=lease.block_ids,
        num_cached_tokens=lease.num_cached_tokens,
        lease_ns=round((lease.expires_s - lease.granted_s) * 1e9),
    )


def shm_to_pb(offer: RankOffer) -> pb.ShmOffer | None:
    if offer.shm is None:
        return None
    return pb.ShmOffer(path=offer.shm.path, num_bytes=offer.shm.num_bytes, nonce=offer.shm.nonce)


def tcp_to_pb(offer: RankOffer) -> pb.TcpOffer | None:
    if offer.tcp is None:
        return None
    address = join_address(offer.tcp.host, offer.tcp.port)
    return pb.TcpOffer(address=address, is_secured=offer.tcp.is_secured)


def nixl_to_pb(offer: RankOffer) -> pb.NixlOffer | None:
    if offer.nixl is None:
        return None
    return pb.NixlOffer(address=join_address(offer.nixl.host, offer.nixl.port))


def _tcp_from(message: pb.TcpOffer) -> TcpOffer:
    try:
        return TcpOffer(*address_from(message.address), is_secured=message.is_secured)
    except ValueError as error:
        raise InvalidRequestError(f"data address: {error}") from error


def _nixl_from(message: pb.NixlOffer) -> NixlOffer:
    try:
        return NixlOffer(*address_from(message.address))
    except ValueError as error:
        raise InvalidRequestError(f"data address: {error}") from error


def block_hashes_from(message: pb.ReserveRequest, block_size_tokens: int) -> list[bytes]:
    """Raises InvalidRequestError unless they are hashes of full blocks within the prompt.

    They are chained, so that no two blocks of one prompt have the same hash.
    """
    hashes = list(message.block_hashes)
    if len(hashes) > message.num_tokens // block_size_tokens:
        raise InvalidRequestError(
            f"{len(hashes)} block hashes for {message.num_tokens} tokens in blocks of"
            f" {block_size_tokens}"
        )
    if any(len(block_hash) != HASH_BYTES for block_hash in hashes):
        raise InvalidRequestError(f"block hashes must have {HASH_BYTES} bytes each")
    if len(set(hashes)) != len(hashes):
        raise InvalidRequestError("block_hashes names one block twice")
    return hashes


def lease_s_from(lease_ns: int) -> float:
    """Raises InvalidRequestError for an empty lease."""
    if lease_ns == 0:
        raise InvalidRequestError("lease_ns must be above 0")
    return lease_ns / 1e9
