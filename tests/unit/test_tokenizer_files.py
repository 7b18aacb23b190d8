import json
from pathlib import Path

import pytest

from engine.errors import CheckpointError, InvalidRequestError
from gateway.tokenizer import load_text_model
from tests.fakes.byte_tokenizer import byte_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_tokenizer()._model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_config(directory: Path, **fields) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def test_a_directory_needs_its_tokenizer_only(directory):
    model = load_text_model(directory)
    assert model.tokenizer.encode_now("hi", add_special_tokens=True) == [104, 105]
    assert (model.chat_template, dict(model.special_tokens)) == (None, {})


def test_special_tokens_are_strings_or_objects(directory):
    write_config(directory, bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None)
    assert load_text_model(directory).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    "template", ["T", [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}]]
)
def test_the_chat_template_is_in_the_config(directory, template):
    write_config(directory, chat_template=template)
    assert load_text_model(directory).chat_template == "T"


def test_a_template_file_comes_first(directory):
    write_config(directory, chat_template="T")
    (directory / "chat_template.jinja").write_text("F")
    assert load_text_model(directory).chat_template == "F"


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; save one"):
        load_text_model(tmp_path)


def test_broken_files_are_named(directory):
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        load_text_model(directory)
    (directory / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_text_model(directory)


async def test_long_texts_are_tokenised_off_the_loop_and_alike():
    tokenizer = byte_tokenizer()
    text = "ab" * 5000
    assert await tokenizer.encode(text, add_special_tokens=False) == list(text.encode())


async def test_lone_surrogates_are_a_bad_request():
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        await byte_tokenizer().encode("\ud800", add_special_tokens=False)
