"""Turns what a user calls a model into a path on this machine; fetches what is not there yet."""

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.checkpoint.demo import fetch_demo
from engine.checkpoint.gguf_file import GgufFile
from engine.errors import CheckpointError

Progress = Callable[[str, int, int], None]
"""Called with (what is done, bytes done, bytes in all), the last 0 while it is not known."""

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_TOKENIZER_KEY = "tokenizer.ggml.tokens"


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """$XDG_CACHE_HOME/isthmus, else ~/.cache/isthmus; the caller's settings may say otherwise."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "isthmus"


def locate_model(model: str, *, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return the directory or .gguf file of `model`, complete enough to be served.

    Args:
        model: "demo", a directory, a .gguf file, or a Hugging Face id such as "Qwen/Qwen3-0.6B".
        cache_dir: where the demo model is kept; Hugging Face keeps its own cache.
        progress: called now and then while something is fetched.

    Raises:
        CheckpointError: nothing is there, something lacks, or it cannot be fetched.
    """
    if model == "demo":
        return fetch_demo(cache_dir, progress)
    path = Path(model).expanduser()
    if path.is_dir():
        _check_directory(path)
        return path
    if path.is_file():
        _check_gguf(path)
        return path
    if _may_be_hub_id(model):
        path = _fetch_from_hub(model, progress)
        _check_directory(path)
        return path
    raise CheckpointError(
        f"{model} does not exist; name a model directory, a .gguf file, "
        'a Hugging Face id such as "Qwen/Qwen3-0.6B", or "demo"'
    )


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; name the file instead: {path / ggufs[0]}" if ggufs else ""
        raise CheckpointError(f"{path} is no model directory: it has no config.json{hint}")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} has no .safetensors file; other weight formats are not read")
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json; save it with the model's tokenizer "
            "(save_pretrained of a fast tokenizer writes it)"
        )


def _check_gguf(path: Path) -> None:
    if _TOKENIZER_KEY not in GgufFile(path).metadata:
        raise CheckpointError(f"{path} holds no tokenizer ({_TOKENIZER_KEY}); convert it with one")


def _may_be_hub_id(model: str) -> bool:
    parts = model.split("/")
    return (
        len(parts) == 2
        and not model.endswith(".gguf")
        and all(part and part[0].isalnum() and part.isprintable() for part in parts)
    )


def _fetch_from_hub(model: str, progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if progress is not None:
        progress(f"Fetching {model}", 0, 0)
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{model} is neither a path here nor can it be fetched from Hugging Face: {reason}; "
            "check the id and the network, or name a local directory"
        ) from None
