"""A GGUF file's tensors under Hugging Face names and in Hugging Face's row order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.form import MAX_EXPERTS
from engine.checkpoint.gguf_file import GgufFile
from engine.errors import CheckpointError

_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
"""The star stands for the experts, which are one tensor together."""
_NAMES_OF_ARCHITECTURE: dict[str, dict[str, str]] = {
    "gemma2": _NORMS_AROUND,
    "gemma3": _NORMS_AROUND,
    "olmo2": _NORMS_AROUND,
    "qwen2moe": _EXPERTS,
    "qwen3moe": _EXPERTS,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
"""What a family has besides `_LAYER_NAMES`, or under another name."""
_INTERLEAVED_ARCHITECTURES = {"llama", "granite"}
_OFFSET_NORM_ARCHITECTURES = {"gemma2", "gemma3"}
"""Files hold the norms' weights with the 1 that the model would add."""
_CONFIG_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""Part of the configuration: see `gguf_config`."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of the file, or one expert's part of it."""

    tensor: str
    expert: int | None = None


class GgufSource:
    """Use it in a `with` block; tensors are dequantised to float32 as they are read."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._head_dim = config.head_dim
        architecture = str(self._file.metadata["general.architecture"])
        self._is_interleaved = architecture in _INTERLEAVED_ARCHITECTURES
        self._has_offset_norms = architecture in _OFFSET_NORM_ARCHITECTURES
        layer_names = {**_LAYER_NAMES, **_NAMES_OF_ARCHITECTURE.get(architecture, {})}
        self._place_of: dict[str, _Place] = {}
        for name in self._file.tensors:
            if name not in _CONFIG_TENSORS and not name.endswith("attn_rot_embd.weight"):
                self._add(name, _hugging_face_name(path, name, layer_names))
        self.names = frozenset(self._place_of)

    def _add(self, name: str, hugging_face_name: str) -> None:
        if "*" not in hugging_face_name:
            self._place_of[hugging_face_name] = _Place(name)
            return
        shape = self._file.tensors[name].shape
        if len(shape) != 3 or shape[0] > MAX_EXPERTS:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {list(shape)} does not hold 1 to "
                f"{MAX_EXPERTS} experts"
            )
        for expert in range(shape[0]):
            self._place_of[hugging_face_name.replace("*", str(expert))] = _Place(name, expert)

    def __enter__(self) -> "GgufSource":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The mapping goes with the last reference to the file."""

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place_of[name]
        shape = self._file.tensors[place.tensor].shape
        if place.expert is not None:
            return shape[1:]
        return (1, *shape) if _is_flat_gate(name, shape) else shape

    def location(self, name: str) -> str:
        return f"{self._file.path}: {self._place_of[name].tensor}"

    def read(
        self, name: str, dim: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        place = self._place_of[name]
        shape = self.shape(name)
        box = [range(size) for size in shape]
        box[dim] = range(start, shape[dim] if length is None else start + length)
        if len(shape) == 1:
            values = torch.from_numpy(self._file.read(place.tensor, columns=box[0])).squeeze(0)
        else:
            rows, columns = box
            first = (place.expert or 0) * shape[0]
            rows = range(first + rows.start, first + rows.stop)
            values = torch.from_numpy(self._file.read(place.tensor, rows, columns))
        if self._is_interleaved and (".q_proj." in name or ".k_proj." in name):
            return self._half_split(values)
        if self._has_offset_norms and "norm" in name:
            return values - 1
        return values

    def _half_split(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo llama.cpp's order of rows: pairs (2i, 2i + 1) of a head become (i, i + A / 2).

        Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.permute, inverted.
        """
        heads = rows.unflatten(0, (-1, self._head_dim // 2, 2))
        ordered: torch.Tensor = heads.transpose(1, 2).reshape(rows.shape)
        return ordered


def _is_flat_gate(name: str, shape: tuple[int, ...]) -> bool:
    """A projection to one number is a vector in some files."""
    return name.endswith("shared_expert_gate.weight") and len(shape) == 1


def _hugging_face_name(path: Path, name: str, layer_names: Mapping[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    if suffix in {"weight", "bias"}:
        if stem in _OUTER_NAMES:
            return f"{_OUTER_NAMES[stem]}.{suffix}"
        block, _, rest = stem.partition(".")
        index, _, part = rest.partition(".")
        if block == "blk" and index.isdecimal() and part in layer_names:
            return f"model.layers.{index}.{layer_names[part]}.{suffix}"
    raise CheckpointError(f"{path}: tensor {name} is of a kind that this model does not have")
