"""A decoder-only language model over the paged KV cache: one class, built as its form says.

Shape suffixes: T tokens of this step, B sequences, D model dim, V vocabulary, A head dim, P blocks
in the pool, J key then value, G KV heads, C slots in a block.
"""

from typing import Protocol

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.norm import RmsNorm
from engine.layers.rope import RotaryEmbedding
from engine.models.decoder_layer import DecoderLayer
from engine.parallel.axes import ParallelAxes
from engine.parallel.vocabulary import LmHead, VocabParallelEmbedding


class KvLayers(Protocol):
    """What a forward pass needs of a KV pool."""

    def layer(self, index: int) -> torch.Tensor:
        """Return kv_PJGCA of one of this rank's layers, from 0: a view, written in place."""


class CausalLM(nn.Module):
    """Embedding, layers, final norm and LM head of one rank.

    `engine.models.build` makes it; its parameters are filled by `engine.weights.load`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        axes: ParallelAxes,
        kernels: Kernels,
        rope: RotaryEmbedding,
        local_rope: RotaryEmbedding | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self._rope = rope
        self._local_rope = local_rope
        size = config.hidden_size
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, size, name="model.embed_tokens", axis=axes.tp
        )
        self._sequence = tuple(
            DecoderLayer(config, index, axes=axes, kernels=kernels)
            for index in range(config.num_layers)
        )
        self.layers = nn.ModuleList(self._sequence)
        self.norm = RmsNorm(size, config, name="model.norm", kernels=kernels)
        self.lm_head = LmHead(
            config.vocab_size,
            size,
            name="lm_head",
            tied_to=self.embedding if config.tie_word_embeddings else None,
            axis=axes.tp,
            kernels=kernels,
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_pool: KvLayers) -> torch.Tensor:
        """Run one step: write the step's keys and values to the pool, return hidden_TD.

        Calls `kernels.begin_step`. Every rank of the tensor axis must call it with the same batch;
        the collectives are those of `DecoderLayer`, layer after layer.
        """
        self.kernels.begin_step(batch)
        tables = self._rope.tables(batch)
        local_tables = tables if self._local_rope is None else self._local_rope.tables(batch)
        residual_TD = self._embed(batch.token_T)
        added_TD: torch.Tensor | None = None
        for index, layer in enumerate(self._sequence):
            cos_TA, sin_TA = local_tables if layer.has_local_rope else tables
            kv_PJGCA = kv_pool.layer(index)
            added_TD = layer(added_TD, residual_TD, cos_TA, sin_TA, kv_PJGCA, batch)
        assert added_TD is not None, "a model has layers"
        return self.norm.add(added_TD, residual_TD)

    @torch.inference_mode()
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """logits_BV in float32 of the hidden states that tokens are drawn from."""
        logits_BV: torch.Tensor = self.lm_head(hidden_BD)
        form = self.config.form
        if form.logit_scale != 1.0:
            logits_BV *= form.logit_scale
        if form.logit_cap is not None:
            logits_BV = logits_BV.div_(form.logit_cap).tanh_().mul_(form.logit_cap)
        return logits_BV

    def _embed(self, token_T: torch.Tensor) -> torch.Tensor:
        """The embedding, scaled by a factor of the weights' own precision, as Gemma was trained."""
        x_TD: torch.Tensor = self.embedding(token_T)
        if self.config.form.embedding_scale != 1.0:
            x_TD *= torch.tensor(self.config.form.embedding_scale, dtype=x_TD.dtype).item()
        return x_TD
