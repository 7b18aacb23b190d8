from protos.isthmus.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "output_token_ids", "sampling", "decode_worker_id", "decode_address")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _sampling_pb2.SamplingParams
    decode_worker_id: str
    decode_address: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., decode_worker_id: _Optional[str] = ..., decode_address: _Optional[str] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("first_token", "handover")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    first_token: FirstToken
    handover: HandoverReport
    def __init__(self, first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., handover: _Optional[_Union[HandoverReport, _Mapping]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "logprobs", "finish_reason", "num_cached_tokens", "queue_ns", "compute_ns", "fetch_failure")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    FETCH_FAILURE_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: _sampling_pb2.TokenLogprobs
    finish_reason: _sampling_pb2.FinishReason
    num_cached_tokens: int
    queue_ns: int
    compute_ns: int
    fetch_failure: str
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_sampling_pb2.TokenLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ..., num_cached_tokens: _Optional[int] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., fetch_failure: _Optional[str] = ...) -> None: ...

class HandoverReport(_message.Message):
    __slots__ = ("num_bytes", "num_tokens", "num_cached_tokens", "reserve_ns", "transfer_ns", "commit_ns", "exposed_ns", "data_plane", "retransfers")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_NS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_NS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_NS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_NS_FIELD_NUMBER: _ClassVar[int]
    DATA_PLANE_FIELD_NUMBER: _ClassVar[int]
    RETRANSFERS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    num_tokens: int
    num_cached_tokens: int
    reserve_ns: int
    transfer_ns: int
    commit_ns: int
    exposed_ns: int
    data_plane: str
    retransfers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, num_bytes: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., reserve_ns: _Optional[int] = ..., transfer_ns: _Optional[int] = ..., commit_ns: _Optional[int] = ..., exposed_ns: _Optional[int] = ..., data_plane: _Optional[str] = ..., retransfers: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("num_freed_blocks",)
    NUM_FREED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_freed_blocks: int
    def __init__(self, num_freed_blocks: _Optional[int] = ...) -> None: ...
