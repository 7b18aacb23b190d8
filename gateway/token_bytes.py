"""What each token id stands for, as bytes; the ground of incremental detokenisation."""

import json

from tokenizers import Tokenizer as TokenizerModel

from engine.errors import CheckpointError


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return spelling | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


class TokenBytes:
    """Maps token ids to bytes; each id is worked out once, when it is first seen.

    Joining the bytes of a sequence and decoding them as UTF-8 gives its text. Ids outside the
    vocabulary stand for nothing: models pad their vocabulary.
    """

    def __init__(self, model: TokenizerModel) -> None:
        self._model = model
        decoders = _decoders(model)
        self._is_byte_level = "ByteLevel" in decoders
        self.adds_leading_space = not decoders.keys().isdisjoint({"Strip", "Metaspace"})
        """Texts are tokenised with a space put in front of them."""
        self._known: dict[int, bytes] = {}
        self.special_ids = frozenset(
            token_id
            for token_id, token in model.get_added_tokens_decoder().items()
            if token.special
        )

    def of(self, token_id: int) -> bytes:
        """The bytes of a token, special ones spelled out."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._spell(token_id)
        return known

    def visible(self, token_id: int) -> bytes:
        """The bytes that a token adds to an answer: none for special tokens."""
        return b"" if token_id in self.special_ids else self.of(token_id)

    def _spell(self, token_id: int) -> bytes:
        token = self._model.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token that is not written in the byte alphabet
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()


def _decoders(model: TokenizerModel) -> dict[str, object]:
    """The steps of the tokenizer's decoder by type: byte-level BPE's, or sentencepiece's.

    Raises:
        CheckpointError: the tokenizer decodes in another way.
    """
    state = json.loads(model.decoder.__getstate__()) if model.decoder is not None else {}
    found = {part["type"]: part for part in state.get("decoders", [state]) if "type" in part}
    if not found.keys() & {"ByteLevel", "Replace", "Metaspace", "ByteFallback"}:
        raise CheckpointError(
            f"the tokenizer decodes by {sorted(found) or 'nothing'}; "
            "supported are ByteLevel, and Replace, Metaspace or ByteFallback (sentencepiece)"
        )
    return found
