"""What transformers says about a token sequence, on the same checkpoint; the judge of parity."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


class Reference:
    """Greedy decoding by transformers in float32."""

    def __init__(self, checkpoint: Path) -> None:
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def first_difference(self, prompt: Sequence[int], answer: Sequence[int]) -> int | None:
        """Index of the first token of `answer` that greedy decoding would not have drawn.

        By induction over the tokens, `answer` is transformers' greedy continuation if and only if
        each token is the argmax after prompt + the tokens before it: one pass checks them all.
        """
        token_ids = torch.tensor([[*prompt, *answer]])
        output = self._model(token_ids, logits_to_keep=len(answer) + 1)
        logits_TV = output.logits[0, :-1]
        wrong = (logits_TV.argmax(-1) != torch.tensor(answer)).nonzero()
        return None if len(wrong) == 0 else int(wrong[0, 0])
