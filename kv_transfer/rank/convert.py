"""Messages between the ranks of one worker to and from the package's values, checked."""

from collections.abc import Iterable

from engine.errors import InvalidRequestError
from engine.kv_cache.layout import KvLayout
from kv_transfer import convert
from kv_transfer.memory import KvMemory
from kv_transfer.plane import WriteWindow
from kv_transfer.reshard import Box, Transfer
from kv_transfer.sending_rank import Target
from kv_transfer.slot_ranges import SlotRange
from protos.isthmus.v1 import kv_rank_pb2 as pb

MAX_LEASE_ID = (1 << 62) - 1


def target_to_pb(target: Target) -> pb.KvTarget:
    return pb.KvTarget(
        name=target.name,
        layout=convert.layout_to_pb(target.layout),
        num_blocks=target.num_blocks,
        shm=convert.shm_to_pb(target.offer),
        tcp=convert.tcp_to_pb(target.offer),
        nixl=convert.nixl_to_pb(target.offer),
        peer_address=target.peer_address,
        boxes=(
            pb.BoxPair(
                source_layer=transfer.source.first_layer,
                target_layer=transfer.target.first_layer,
                num_layers=transfer.source.num_layers,
                source_head=transfer.source.first_head,
                target_head=transfer.target.first_head,
                num_heads=transfer.source.num_heads,
            )
            for transfer in target.transfers
        ),
    )


def target_from(message: pb.KvTarget, source: KvLayout) -> Target:
    """Raises InvalidRequestError when a box is outside either pool, or the pools do not fit."""
    layout = convert.layout_from(message.layout)
    cells = [(each.dtype, each.head_dim, each.num_parts) for each in (layout, source)]
    if cells[0] != cells[1] or not message.boxes:
        raise InvalidRequestError(f"{message.name} has {layout}, this rank {source}")
    return Target(
        name=message.name,
        offer=convert.rank_offer_from(message),
        layout=layout,
        num_blocks=message.num_blocks,
        peer_address=message.peer_address,
        transfers=tuple(_transfer_from(box, source, layout) for box in message.boxes),
    )


def slots_to_pb(parts: Iterable[SlotRange]) -> Iterable[pb.SlotRange]:
    for part in parts:
        yield pb.SlotRange(
            local_block_id=part.local_block_id,
            local_slot=part.local_slot,
            remote_block_id=part.remote_block_id,
            remote_slot=part.remote_slot,
            num_slots=part.num_slots,
        )


def slots_from(
    messages: Iterable[pb.SlotRange], memory: KvMemory, targets: Iterable[Target]
) -> list[SlotRange]:
    """Raises InvalidRequestError for slots outside this rank's pool, or outside a target's."""
    remote_blocks = min(target.num_blocks for target in targets)
    remote_size = min(target.layout.block_size_tokens for target in targets)
    parts = [
        SlotRange(
            message.local_block_id,
            message.local_slot,
            message.remote_block_id,
            message.remote_slot,
            message.num_slots,
        )
        for message in messages
    ]
    for part in parts:
        is_inside = (
            part.num_slots > 0
            and part.local_block_id < memory.num_blocks
            and part.local_slot + part.num_slots <= memory.layout.block_size_tokens
            and part.remote_block_id < remote_blocks
            and part.remote_slot + part.num_slots <= remote_size
        )
        if not is_inside:
            raise InvalidRequestError(f"no such slots: {part}")
    return parts


def window_to_pb(window: WriteWindow) -> pb.OpenWindowRequest:
    return pb.OpenWindowRequest(
        lease_id=window.lease_id,
        block_ids=window.block_ids,
        first_token=window.first_token,
        end_token=window.end_token,
    )


def window_from(message: pb.OpenWindowRequest, memory: KvMemory) -> WriteWindow:
    """Raises InvalidRequestError for blocks that are not there or do not hold the tokens."""
    block_ids = tuple(message.block_ids)
    num_tokens = len(block_ids) * memory.layout.block_size_tokens
    is_sound = (
        len(set(block_ids)) == len(block_ids)
        and all(block_id < memory.num_blocks for block_id in block_ids)
        and message.first_token <= message.end_token <= num_tokens
    )
    if not is_sound:
        raise InvalidRequestError(
            f"tokens [{message.first_token}, {message.end_token}) of {len(block_ids)} blocks"
        )
    return WriteWindow(
        lease_id_from(message.lease_id), block_ids, message.first_token, message.end_token
    )


def lease_id_from(lease_id: int) -> int:
    """Raises InvalidRequestError for an id that no lease has."""
    if not 0 < lease_id <= MAX_LEASE_ID:
        raise InvalidRequestError(f"lease id {lease_id}")
    return lease_id


def _transfer_from(message: pb.BoxPair, source: KvLayout, target: KvLayout) -> Transfer:
    shape = message.num_layers, message.num_heads
    boxes = (
        Box(message.source_layer, shape[0], message.source_head, shape[1]),
        Box(message.target_layer, shape[0], message.target_head, shape[1]),
    )
    for box, layout in zip(boxes, (source, target), strict=True):
        if not box.is_inside(layout):
            raise InvalidRequestError(f"{box} is not in {layout}")
    return Transfer(0, 0, *boxes)
