from protos.isthmus.v1 import inference_pb2 as _inference_pb2
from protos.isthmus.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServeRequest(_message.Message):
    __slots__ = ("submit", "abort")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    submit: SubmitSequence
    abort: AbortSequence
    def __init__(self, submit: _Optional[_Union[SubmitSequence, _Mapping]] = ..., abort: _Optional[_Union[AbortSequence, _Mapping]] = ...) -> None: ...

class SubmitSequence(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "output_token_ids", "sampling", "prefill_locally", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOCALLY_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _sampling_pb2.SamplingParams
    prefill_locally: bool
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., prefill_locally: _Optional[bool] = ..., traceparent: _Optional[str] = ...) -> None: ...

class AbortSequence(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ServeResponse(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("request_id", "token", "aborted", "error", "degraded")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token: DecodedToken
    aborted: AbortedSequence
    error: SequenceError
    degraded: _inference_pb2.Degradation
    def __init__(self, request_id: _Optional[str] = ..., token: _Optional[_Union[DecodedToken, _Mapping]] = ..., aborted: _Optional[_Union[AbortedSequence, _Mapping]] = ..., error: _Optional[_Union[SequenceError, _Mapping]] = ..., degraded: _Optional[_Union[_inference_pb2.Degradation, _Mapping]] = ...) -> None: ...

class DecodedToken(_message.Message):
    __slots__ = ("token_id", "logprobs", "finish_reason", "first_step")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: _sampling_pb2.TokenLogprobs
    finish_reason: _sampling_pb2.FinishReason
    first_step: FirstStepReport
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_sampling_pb2.TokenLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ..., first_step: _Optional[_Union[FirstStepReport, _Mapping]] = ...) -> None: ...

class FirstStepReport(_message.Message):
    __slots__ = ("queue_ns", "step_ns", "prefilled_locally", "num_cached_tokens")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    STEP_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_LOCALLY_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    step_ns: int
    prefilled_locally: bool
    num_cached_tokens: int
    def __init__(self, queue_ns: _Optional[int] = ..., step_ns: _Optional[int] = ..., prefilled_locally: _Optional[bool] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class AbortedSequence(_message.Message):
    __slots__ = ("num_freed_blocks",)
    NUM_FREED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_freed_blocks: int
    def __init__(self, num_freed_blocks: _Optional[int] = ...) -> None: ...

class SequenceError(_message.Message):
    __slots__ = ("status_code", "message")
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    status_code: int
    message: str
    def __init__(self, status_code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...
