from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_size_tokens", "dtype", "num_parts")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int
    dtype: str
    num_parts: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., num_parts: _Optional[int] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("sender_id", "layout", "model_digest", "protocol_version")
    SENDER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    sender_id: str
    layout: KvLayout
    model_digest: str
    protocol_version: int
    def __init__(self, sender_id: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., model_digest: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("receiver_id", "epoch", "layout", "num_blocks", "ranks")
    RECEIVER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    receiver_id: str
    epoch: int
    layout: KvLayout
    num_blocks: int
    ranks: _containers.RepeatedCompositeFieldContainer[KvRank]
    def __init__(self, receiver_id: _Optional[str] = ..., epoch: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., num_blocks: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[KvRank, _Mapping]]] = ...) -> None: ...

class KvRank(_message.Message):
    __slots__ = ("layers", "kv_heads", "shm", "tcp", "nixl", "data_shard")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    DATA_SHARD_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    kv_heads: _containers.RepeatedScalarFieldContainer[int]
    shm: ShmOffer
    tcp: TcpOffer
    nixl: NixlOffer
    data_shard: int
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., kv_heads: _Optional[_Iterable[int]] = ..., shm: _Optional[_Union[ShmOffer, _Mapping]] = ..., tcp: _Optional[_Union[TcpOffer, _Mapping]] = ..., nixl: _Optional[_Union[NixlOffer, _Mapping]] = ..., data_shard: _Optional[int] = ...) -> None: ...

class ShmOffer(_message.Message):
    __slots__ = ("path", "num_bytes", "nonce")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    path: str
    num_bytes: int
    nonce: bytes
    def __init__(self, path: _Optional[str] = ..., num_bytes: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class TcpOffer(_message.Message):
    __slots__ = ("address", "is_secured")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IS_SECURED_FIELD_NUMBER: _ClassVar[int]
    address: str
    is_secured: bool
    def __init__(self, address: _Optional[str] = ..., is_secured: _Optional[bool] = ...) -> None: ...

class NixlOffer(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "num_tokens", "block_hashes", "lease_ns")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    num_tokens: int
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ns: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_tokens: _Optional[int] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., lease_ns: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("lease_id", "block_ids", "num_cached_tokens", "lease_ns")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    num_cached_tokens: int
    lease_ns: int
    def __init__(self, lease_id: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., num_cached_tokens: _Optional[int] = ..., lease_ns: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("epoch", "lease_ids", "lease_ns")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    lease_ns: int
    def __init__(self, epoch: _Optional[int] = ..., lease_ids: _Optional[_Iterable[int]] = ..., lease_ns: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("lost_lease_ids",)
    LOST_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lost_lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lost_lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("epoch", "lease_id", "num_bytes", "first_token_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lease_id: int
    num_bytes: int
    first_token_id: int
    def __init__(self, epoch: _Optional[int] = ..., lease_id: _Optional[int] = ..., num_bytes: _Optional[int] = ..., first_token_id: _Optional[int] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("epoch", "lease_id", "request_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lease_id: int
    request_id: str
    def __init__(self, epoch: _Optional[int] = ..., lease_id: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("num_freed_blocks",)
    NUM_FREED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_freed_blocks: int
    def __init__(self, num_freed_blocks: _Optional[int] = ...) -> None: ...
