"""Tokenizers built from GGUF metadata equal those that transformers builds from the same."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as TokenizerModel

from engine.errors import CheckpointError
from gateway.gguf_tokenizer import special_token, tokenizer_from_gguf
from gateway.tokenizer import Tokenizer

CORPUS = sorted(Path(__file__).parents[2].glob("engine/**/*.py"))
TEXTS = [
    "Hello world",
    "  leading and   inner spaces ",
    "It's 12345 o'clock, DON'T we'll I'M",
    "tabs\tand\r\nlines\n\n\n  indented\n",
    "Grüße, 世界! \U0001f600 e\u0301 \u00e9",
    "def f(x):\n    return x[1:2] + 'a' * 3.14e10\n",
    "<|im_start|>user\nhi<|im_end|>",
    "a<think>b",
    "",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_metadata(pre: str) -> dict[str, object]:
    model = TokenizerModel(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((path.read_text() for path in CORPUS), trainer)
    vocab = sorted(model.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(model.to_str())["model"]["merges"]
    tokens = [*(token for token, _ in vocab), "<think>"]
    types = [3 if token in SPECIALS else 1 for token in tokens[:-1]] + [4]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_metadata() -> dict[str, object]:
    """Pieces in the order in which merging made them, as sentencepiece scores its own."""
    model = TokenizerModel(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=800, show_progress=False)
    model.train_from_iterator((path.read_text() for path in CORPUS), trainer)
    vocab = sorted(model.get_vocab().items(), key=lambda item: item[1])
    pieces = [token for token, _ in vocab if token.isprintable()]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces]
    types = [2, 3, 3, *([6] * 256), *([1] * len(pieces))]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return {
        "general.architecture": "phi3",  # transformers' nearest: the prefix by a normaliser
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def transformers_tokenizer(metadata: dict[str, object]) -> TokenizerModel:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    fields = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in names.items()
        if f"tokenizer.{key}" in metadata
    }
    model: TokenizerModel
    model, _ = mapping.convert_gguf_tokenizer(metadata["general.architecture"], fields)
    return model


def ids(model: TokenizerModel, text: str) -> list[int]:
    return model.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def trained() -> dict[str, object]:
    return byte_level_metadata("gpt-2")


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_equals_transformers(trained, pre):
    metadata = {**trained, "tokenizer.ggml.pre": pre}
    ours, theirs = tokenizer_from_gguf(metadata), transformers_tokenizer(metadata)
    for text in TEXTS:
        if pre == "qwen2" and "e\u0301" in text:
            continue  # Qwen2's own tokenizer.json normalises to NFC, transformers' does not here
        assert ids(ours, text) == ids(theirs, text), text


def test_qwen2_composes_characters(trained):
    model = tokenizer_from_gguf({**trained, "tokenizer.ggml.pre": "qwen2"})
    assert ids(model, "e\u0301") == ids(model, "\u00e9")


def test_smollm_equals_its_published_configuration(trained):
    """SmolLM2's tokenizer.json: digits one by one, then GPT-2's byte-level split."""
    ours = tokenizer_from_gguf({**trained, "tokenizer.ggml.pre": "smollm"})
    theirs = tokenizer_from_gguf(trained)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for text in [*TEXTS, "1234 5.6e7 x9y"]:
        assert ids(ours, text) == ids(theirs, text), text


def test_default_cuts_digits_in_threes_and_punctuation_apart(trained):
    model = tokenizer_from_gguf({**trained, "tokenizer.ggml.pre": "default"})
    pieces = model.pre_tokenizer.pre_tokenize_str("a 1234567!? b")
    assert [piece.replace("\u0120", " ") for piece, _ in pieces] == [
        "a", " ", "123", "456", "7", "!?", " b",
    ]  # fmt: skip


def test_sentencepiece_equals_transformers():
    metadata = sentencepiece_metadata()
    ours, theirs = tokenizer_from_gguf(metadata), transformers_tokenizer(metadata)
    for text in TEXTS[:-3]:
        assert ids(ours, text) == ids(theirs, text), text


def test_sentencepiece_puts_the_bos_token_first():
    model = tokenizer_from_gguf(sentencepiece_metadata())
    assert model.encode("hello").ids[0] == 1
    assert model.encode("hello", add_special_tokens=False).ids[0] != 1


@pytest.mark.parametrize("text", TEXTS)
def test_texts_survive_the_way_there_and_back(trained, text):
    for metadata in ({**trained, "tokenizer.ggml.pre": "smollm"}, sentencepiece_metadata()):
        tokenizer = Tokenizer(tokenizer_from_gguf(metadata))
        decoded = tokenizer.decode(tokenizer.encode_now(text, add_special_tokens=False))
        assert decoded == text


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=40))
def test_decoding_equals_the_library(trained, text):
    model = tokenizer_from_gguf(trained)
    tokenizer = Tokenizer(model)
    token_ids = tokenizer.encode_now(text, add_special_tokens=False)
    assert tokenizer.decode(token_ids) == model.decode(token_ids, skip_special_tokens=False)


def test_control_tokens_are_special_and_user_defined_ones_are_not(trained):
    tokenizer = Tokenizer(tokenizer_from_gguf(trained))
    assert tokenizer.token_bytes.special_ids == {0, 1, 2}
    assert tokenizer.encode_now("<|im_end|>", add_special_tokens=False) == [2]
    assert tokenizer.token_bytes.visible(2) == b""
    assert tokenizer.token_bytes.visible(tokenizer.num_tokens - 1) == b"<think>"
    assert special_token(trained, "eos") == "<|im_end|>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'; supported are"),
        ({"tokenizer.ggml.model": None}, "supported are"),
        ({"tokenizer.ggml.pre": "viking"}, "'viking'; supported are"),
        ({"tokenizer.ggml.tokens": None}, "carries no tokenizer"),
        ({"tokenizer.ggml.merges": None}, "carries no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ],
)
def test_what_is_missing_or_unknown_is_named(trained, change, words):
    with pytest.raises(CheckpointError, match=words):
        tokenizer_from_gguf({**trained, **change})


def test_other_decoders_are_refused():
    model = TokenizerModel(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="isolated")
    model.add_tokens([AddedToken("x")])
    with pytest.raises(CheckpointError, match="decodes by"):
        Tokenizer(model)
