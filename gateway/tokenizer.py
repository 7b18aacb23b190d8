"""The served model's tokenizer and chat template, from its checkpoint."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as TokenizerModel

from engine.checkpoint.gguf_file import GgufFile
from engine.errors import CheckpointError, InvalidRequestError
from gateway.gguf_tokenizer import special_token, tokenizer_from_gguf
from gateway.token_bytes import TokenBytes

OFF_LOOP_CHARS = 4096
"""Longer texts are tokenised in a thread; shorter ones take less than a millisecond."""

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Text to token ids and back. Safe to call from several threads."""

    def __init__(self, model: TokenizerModel) -> None:
        self._model = model
        self.token_bytes = TokenBytes(model)
        self.num_tokens = model.get_vocab_size(with_added_tokens=True)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenise without holding up the event loop.

        Raises:
            InvalidRequestError: the text is not valid Unicode (a lone surrogate).
        """
        if len(text) <= OFF_LOOP_CHARS:
            return self.encode_now(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_now, text, add_special_tokens=add_special_tokens)

    def encode_now(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # As `encode`, but without working out where in the text each token stands.
            (found,) = self._model.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return found.ids
        except (TypeError, UnicodeError):
            raise InvalidRequestError("the text is not valid Unicode") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids, special tokens spelled out; inverse of encoding a whole text."""
        text = b"".join(map(self.token_bytes.of, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.token_bytes.adds_leading_space else text


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModel:
    """What the gateway reads from a checkpoint."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """bos_token and so on, as chat templates name them."""


def load_text_model(path: Path) -> TextModel:
    """Read tokenizer and chat template of a Hugging Face directory or a GGUF file.

    Raises:
        CheckpointError: a file is missing or makes no sense; the text names it.
    """
    return _from_directory(path) if path.is_dir() else _from_gguf(path)


def _from_gguf(path: Path) -> TextModel:
    metadata = GgufFile(path).metadata
    template = metadata.get("tokenizer.chat_template")
    try:
        model = tokenizer_from_gguf(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    texts = {name: special_token(metadata, key) for name, key in names.items()}
    return TextModel(
        tokenizer=Tokenizer(model),
        chat_template=template if isinstance(template, str) else None,
        special_tokens={name: text for name, text in texts.items() if text is not None},
    )


def _from_directory(path: Path) -> TextModel:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json; save one with the transformers library: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        model = TokenizerModel.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    config = _json_object(path / "tokenizer_config.json")
    return TextModel(
        tokenizer=Tokenizer(model),
        chat_template=_template(path, config),
        special_tokens=_special_tokens(config),
    )


def _template(path: Path, config: Mapping[str, object]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _json_object(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return value
