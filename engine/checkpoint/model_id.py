"""What a served model is called, in the registry and by clients."""

from pathlib import Path


def model_id_of(model: str) -> str:
    """The name that every process of a mesh gives to `model` (as the operator wrote it).

    A path is called by its last part, a GGUF file without its suffix; a Hugging Face id and "demo"
    stand for themselves.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return model
    name = path.resolve().name
    return name.removesuffix(".gguf")
