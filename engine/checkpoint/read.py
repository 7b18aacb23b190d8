"""The door to `ModelConfig`: whatever form the checkpoint has."""

from pathlib import Path

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.gguf_config import config_from_gguf
from engine.checkpoint.hf_config import config_from_directory
from engine.errors import CheckpointError


def read_config(path: Path) -> ModelConfig:
    """Read the configuration of a directory or a .gguf file.

    Raises:
        CheckpointError: a file is missing, malformed, or the model is of an unknown kind.
    """
    try:
        if path.is_dir():
            return config_from_directory(path)
        if path.is_file():
            return config_from_gguf(path)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from None
    raise CheckpointError(f"{path} does not exist; name a model directory or a .gguf file")
