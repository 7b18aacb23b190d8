"""Builds a tokenizer from the metadata of a GGUF file."""

from collections.abc import Mapping, Sequence
from enum import IntEnum

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizerModel

from engine.errors import CheckpointError


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# How text is cut before merging, by `tokenizer.ggml.pre`: each expression splits what the one
# before left. Source: the tokenizer.json that each family publishes; llama.cpp src/llama-vocab.cpp.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_APART = (r"\p{N}", _GPT2)

SPLITS: Mapping[str, Sequence[str]] = {
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
IGNORES_MERGES = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
ADDS_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""Add a bos token when the file does not say."""


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> TokenizerModel:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        CheckpointError: the file has no tokenizer, or one that is not supported.
    """
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise CheckpointError(
            f"tokenizer.ggml.model is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama'"
        )
    _add_marked_tokens(tokenizer, metadata, tokens)
    _add_template(tokenizer, metadata, tokens, adds_bos=_adds_bos(metadata))
    return tokenizer


def special_token(metadata: Mapping[str, object], name: str) -> str | None:
    """The text of the bos, eos, unknown or padding token, where the file names one."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(token_id, int) or not isinstance(tokens, Sequence):
        return None
    return str(tokens[token_id]) if 0 <= token_id < len(tokens) else None


def _byte_level(metadata: Mapping[str, object], tokens: Sequence[str]) -> TokenizerModel:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre is {pre!r}; supported are {sorted(SPLITS)}")
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = TokenizerModel(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in IGNORES_MERGES)
    )
    if SPLITS[pre] == (_QWEN2,):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, object], tokens: Sequence[str]) -> TokenizerModel:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = TokenizerModel(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(metadata, tokens),
            unk_token=special_token(metadata, "unknown") or "<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(pattern=" ", content="\u2581")
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
        strip = [decoders.Strip(content=" ", left=1, right=0)]
    else:
        tokenizer.normalizer = space
        strip = []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(
    metadata: Mapping[str, object], tokens: Sequence[str]
) -> list[tuple[str, str]]:
    """Recover the merges that sentencepiece's scores stand for: the best-scored piece first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, Sequence) or len(scores) != len(tokens):
        raise CheckpointError("tokenizer.ggml.scores is missing or not as long as the tokens")
    types = _types(metadata, len(tokens))
    pieces = {
        token: float(score)
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind in {TokenType.NORMAL, TokenType.USER_DEFINED}
    }
    merges = [
        (score, cut, token)
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    merges.sort(key=lambda merge: (merge[0], merge[1]), reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, token in merges]


def _add_marked_tokens(
    tokenizer: TokenizerModel, metadata: Mapping[str, object], tokens: Sequence[str]
) -> None:
    types = _types(metadata, len(tokens))
    marked = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in marked if k == TokenType.CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in marked if k == TokenType.USER_DEFINED]
    )


def _add_template(
    tokenizer: TokenizerModel,
    metadata: Mapping[str, object],
    tokens: Sequence[str],
    *,
    adds_bos: bool,
) -> None:
    before = special_token(metadata, "bos") if adds_bos else None
    after = special_token(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token") else None
    if before is None and after is None:
        return
    # NOTE: a template names its special tokens by arbitrary ids; real texts may hold ':' or '$'.
    single = " ".join([*(["bos"] if before else []), "$A", *(["eos"] if after else [])])
    named = [("bos", before), ("eos", after)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[(name, tokens.index(text)) for name, text in named if text is not None],
    )


def _adds_bos(metadata: Mapping[str, object]) -> bool:
    default = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in ADDS_BOS
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _types(metadata: Mapping[str, object], num_tokens: int) -> Sequence[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [TokenType.NORMAL] * num_tokens
    if not isinstance(types, Sequence) or len(types) != num_tokens:
        raise CheckpointError("tokenizer.ggml.token_type is not as long as tokenizer.ggml.tokens")
    return types


def _strings(metadata: Mapping[str, object], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise CheckpointError(f"the GGUF metadata has no {key}: the file carries no tokenizer")
    return value
