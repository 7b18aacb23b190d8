"""Loading is strict both ways and names the file, the tensor and the shapes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import read_config
from engine.errors import CheckpointError
from engine.kernels.torch_kernels import TorchKernels
from engine.models.build import build, load_model
from engine.models.causal_lm import CausalLM
from engine.parallel import AxisGroup, ParallelAxes
from engine.parallel.linear import ParallelLinear
from engine.weights import load, open_weights
from tests.checkpoints import tiny_checkpoint, write_gguf

CPU = torch.device("cpu")
Q_NAME = "model.layers.1.self_attn.q_proj.weight"


def loaded(path: Path) -> CausalLM:
    return load_model(path, kernels=TorchKernels(CPU))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit_weights(path, lambda tensors: tensors.pop(Q_NAME))
    with pytest.raises(CheckpointError, match=f"lacks {Q_NAME}"):
        loaded(path)


def test_surplus_tensor_is_named(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit_weights(path, lambda tensors: tensors.update(surplus=torch.zeros(3)))
    with pytest.raises(CheckpointError, match="holds surplus"):
        loaded(path)


@pytest.mark.parametrize("num_layers", [4096, 1 << 24])
def test_more_layers_than_tensors_are_refused_before_they_are_built(
    num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(tmp_path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": num_layers}))
    monkeypatch.delattr("engine.models.causal_lm.DecoderLayer")
    with pytest.raises(CheckpointError, match="layers"):
        loaded(path)


def test_shapes_are_compared_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(tmp_path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "vocab_size": 1 << 24}))
    monkeypatch.delattr(torch, "empty_like")
    with pytest.raises(CheckpointError, match=r"\[384, 64\].*\[16777216, 64\]"):
        loaded(path)


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match="and 49 more"):
        loaded(path)


def test_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit_weights(path, lambda tensors: tensors.update({Q_NAME: torch.zeros(63, 64)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {Q_NAME} .*63.*64, 64"):
        loaded(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_numbers_of_another_kind_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny_checkpoint(tmp_path)
    edit_weights(path, lambda tensors: tensors.update({Q_NAME: tensors[Q_NAME].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{Q_NAME} is stored as"):
        loaded(path)


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(path, lambda tensors: tensors.update({name: torch.zeros(8)}))
    loaded(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.5, 0.9999])
def test_truncated_safetensors_is_named(share: float, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        loaded(path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="60KB")
    shard = sorted(path.glob("model-*.safetensors"))[3]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        loaded(path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "", 7, None])
def test_index_cannot_name_files_elsewhere(name: object, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="60KB")
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"][Q_NAME] = name
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no name of a file"):
        loaded(path)


def test_same_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="60KB")
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(CheckpointError, match=r"is in .* too"):
        loaded(path)


def test_directory_without_weights_is_an_error(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        loaded(path)


def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, dtype="bfloat16")
    model = load_model(path, kernels=TorchKernels(CPU), dtype="float32")
    original = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert model.embedding is not None
    assert model.embedding.weight_VD.dtype == torch.float32
    assert torch.equal(model.embedding.weight_VD, original.float())
    with pytest.raises(ValueError, match="int8"):
        load_model(path, kernels=TorchKernels(CPU), dtype="int8")


def test_loading_leaves_nothing_on_the_meta_device_and_lets_unpacked_weights_go(
    tmp_path: Path,
) -> None:
    config = read_config(path := tiny_checkpoint(tmp_path))
    kernels = TorchKernels(CPU)
    model = build(
        config, axes=ParallelAxes.single(), kernels=kernels, dtype=torch.float32, device=CPU
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    with open_weights(path, config) as weights:
        load(model, weights, kernels=kernels, device=CPU)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(name.endswith("weight_FD") for name, _ in model.named_parameters())


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_ranks_together_hold_exactly_the_whole_weights(form: str, tmp_path: Path) -> None:
    """Two tensor-parallel ranks: slices of fused, split and bias parameters meet without a gap."""
    path = tiny_checkpoint(tmp_path, attention_bias=True)
    if form == "gguf":
        path = write_gguf(path, tmp_path / "model.gguf")
    ranks = [
        load_model(
            path, kernels=TorchKernels(CPU), axes=ParallelAxes(tp=AxisGroup(rank=rank, size=2))
        )
        for rank in range(2)
    ]
    with open_weights(path, read_config(path)) as weights:
        layers = [rank.get_submodule("layers.1") for rank in ranks]
        split = [(32, 16, 16), (32, 16, 16)]
        fused = zip(
            *(
                packed(layer.get_submodule("attention.qkv")).split(sizes)
                for layer, sizes in zip(layers, split, strict=True)
            ),
            strict=True,
        )
        for part, name in zip(fused, "qkv", strict=True):
            assert torch.equal(
                torch.cat(part), weights.read(f"model.layers.1.self_attn.{name}_proj.weight")
            )
        down = [packed(layer.get_submodule("mlp.down")) for layer in layers]
        assert torch.equal(
            torch.cat(down, dim=1), weights.read("model.layers.1.mlp.down_proj.weight")
        )
        first, second = (layer.get_submodule("attention.output") for layer in layers)
        assert isinstance(first.bias_F, torch.Tensor)
        assert torch.equal(first.bias_F, weights.read("model.layers.1.self_attn.o_proj.bias"))
        assert second.bias_F is None


def packed(module: torch.nn.Module) -> torch.Tensor:
    assert isinstance(module, ParallelLinear)
    assert module.packed is not None
    assert isinstance(module.packed.weight, torch.Tensor)
    return module.packed.weight


def test_more_ranks_than_heads_are_an_error(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="tp=5 needs a query head for each rank"):
        load_model(path, kernels=TorchKernels(CPU), axes=ParallelAxes(tp=AxisGroup(0, 5)))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_every_stage_finds_what_is_missing_on_any(stage: int, name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit_weights(path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_model(path, kernels=TorchKernels(CPU), axes=ParallelAxes(pp=AxisGroup(stage, 2)))
