"""A tokenizer whose ids 0 to 255 are bytes; 256 is the end token."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerModel

from gateway.token_bytes import BYTE_OF_CHARACTER
from gateway.tokenizer import Tokenizer

END_TOKEN = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('tools are not for me') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}"
    "{% endfor %}[assistant]"
)


def byte_tokenizer() -> Tokenizer:
    model = TokenizerModel(models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(END_TOKEN, normalized=False, special=True)])
    return Tokenizer(model)
