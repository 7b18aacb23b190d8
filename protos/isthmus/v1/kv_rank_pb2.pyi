from protos.isthmus.v1 import kv_transfer_pb2 as _kv_transfer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StartReceivingRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class StartReceivingResponse(_message.Message):
    __slots__ = ("shm", "tcp", "nixl")
    SHM_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    shm: _kv_transfer_pb2.ShmOffer
    tcp: _kv_transfer_pb2.TcpOffer
    nixl: _kv_transfer_pb2.NixlOffer
    def __init__(self, shm: _Optional[_Union[_kv_transfer_pb2.ShmOffer, _Mapping]] = ..., tcp: _Optional[_Union[_kv_transfer_pb2.TcpOffer, _Mapping]] = ..., nixl: _Optional[_Union[_kv_transfer_pb2.NixlOffer, _Mapping]] = ...) -> None: ...

class OpenWindowRequest(_message.Message):
    __slots__ = ("lease_id", "block_ids", "first_token", "end_token")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    end_token: int
    def __init__(self, lease_id: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., end_token: _Optional[int] = ...) -> None: ...

class OpenWindowResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class FenceResponse(_message.Message):
    __slots__ = ("dropped_connections",)
    class DroppedConnectionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DROPPED_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    dropped_connections: _containers.ScalarMap[str, int]
    def __init__(self, dropped_connections: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenLinkRequest(_message.Message):
    __slots__ = ("targets",)
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[KvTarget]
    def __init__(self, targets: _Optional[_Iterable[_Union[KvTarget, _Mapping]]] = ...) -> None: ...

class KvTarget(_message.Message):
    __slots__ = ("name", "layout", "num_blocks", "shm", "tcp", "nixl", "peer_address", "boxes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    name: str
    layout: _kv_transfer_pb2.KvLayout
    num_blocks: int
    shm: _kv_transfer_pb2.ShmOffer
    tcp: _kv_transfer_pb2.TcpOffer
    nixl: _kv_transfer_pb2.NixlOffer
    peer_address: str
    boxes: _containers.RepeatedCompositeFieldContainer[BoxPair]
    def __init__(self, name: _Optional[str] = ..., layout: _Optional[_Union[_kv_transfer_pb2.KvLayout, _Mapping]] = ..., num_blocks: _Optional[int] = ..., shm: _Optional[_Union[_kv_transfer_pb2.ShmOffer, _Mapping]] = ..., tcp: _Optional[_Union[_kv_transfer_pb2.TcpOffer, _Mapping]] = ..., nixl: _Optional[_Union[_kv_transfer_pb2.NixlOffer, _Mapping]] = ..., peer_address: _Optional[str] = ..., boxes: _Optional[_Iterable[_Union[BoxPair, _Mapping]]] = ...) -> None: ...

class BoxPair(_message.Message):
    __slots__ = ("source_layer", "target_layer", "num_layers", "source_head", "target_head", "num_heads")
    SOURCE_LAYER_FIELD_NUMBER: _ClassVar[int]
    TARGET_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_HEAD_FIELD_NUMBER: _ClassVar[int]
    TARGET_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    source_layer: int
    target_layer: int
    num_layers: int
    source_head: int
    target_head: int
    num_heads: int
    def __init__(self, source_layer: _Optional[int] = ..., target_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., source_head: _Optional[int] = ..., target_head: _Optional[int] = ..., num_heads: _Optional[int] = ...) -> None: ...

class OpenLinkResponse(_message.Message):
    __slots__ = ("link_id", "data_planes", "fallback_reasons")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_PLANES_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASONS_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    data_planes: _containers.RepeatedScalarFieldContainer[str]
    fallback_reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, link_id: _Optional[int] = ..., data_planes: _Optional[_Iterable[str]] = ..., fallback_reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("link_id", "write_id", "lease_id", "epoch", "lease_left_ns", "slots", "step")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_NS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    write_id: int
    lease_id: int
    epoch: int
    lease_left_ns: int
    slots: _containers.RepeatedCompositeFieldContainer[SlotRange]
    step: int
    def __init__(self, link_id: _Optional[int] = ..., write_id: _Optional[int] = ..., lease_id: _Optional[int] = ..., epoch: _Optional[int] = ..., lease_left_ns: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[SlotRange, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class SlotRange(_message.Message):
    __slots__ = ("local_block_id", "local_slot", "remote_block_id", "remote_slot", "num_slots")
    LOCAL_BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SLOT_FIELD_NUMBER: _ClassVar[int]
    REMOTE_BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    REMOTE_SLOT_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    local_block_id: int
    local_slot: int
    remote_block_id: int
    remote_slot: int
    num_slots: int
    def __init__(self, local_block_id: _Optional[int] = ..., local_slot: _Optional[int] = ..., remote_block_id: _Optional[int] = ..., remote_slot: _Optional[int] = ..., num_slots: _Optional[int] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("num_bytes", "write_ns")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_NS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    write_ns: int
    def __init__(self, num_bytes: _Optional[int] = ..., write_ns: _Optional[int] = ...) -> None: ...

class AdjustWriteRequest(_message.Message):
    __slots__ = ("write_id", "lease_left_ns")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_NS_FIELD_NUMBER: _ClassVar[int]
    write_id: int
    lease_left_ns: int
    def __init__(self, write_id: _Optional[int] = ..., lease_left_ns: _Optional[int] = ...) -> None: ...

class AdjustWriteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseLinkRequest(_message.Message):
    __slots__ = ("link_id",)
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    def __init__(self, link_id: _Optional[int] = ...) -> None: ...

class CloseLinkResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
