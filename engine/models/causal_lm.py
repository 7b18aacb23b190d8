"""A decoder-only language model over the paged KV cache; the families differ in few traits.

Shape suffixes: T tokens of this step, B sequences, D model dim, V vocabulary, A head dim, P blocks
in the pool, J key then value, G KV heads, C slots in a block.
"""

from typing import ClassVar, Protocol

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.attention import Attention
from engine.layers.mlp import Mlp
from engine.layers.norm import RmsNorm
from engine.layers.rope import RotaryEmbedding
from engine.parallel.axes import ParallelAxes
from engine.parallel.vocabulary import LmHead, VocabParallelEmbedding


class KvLayers(Protocol):
    """What a forward pass needs of a KV pool."""

    def layer(self, index: int) -> torch.Tensor:
        """Return kv_PJGCA of one of this rank's layers, from 0: a view, written in place."""


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        has_qk_norm: bool,
        axes: ParallelAxes,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RmsNorm(size, eps, name=f"{name}.input_layernorm", kernels=kernels)
        self.attention = Attention(
            config,
            name=f"{name}.self_attn",
            window=config.windows[index],
            has_qk_norm=has_qk_norm,
            axis=axes.tp,
            kernels=kernels,
        )
        self.mlp_norm = RmsNorm(size, eps, name=f"{name}.post_attention_layernorm", kernels=kernels)
        self.mlp = Mlp(config, name=f"{name}.mlp", axis=axes.tp, kernels=kernels)

    def forward(
        self,
        normed_TD: torch.Tensor,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
    ) -> torch.Tensor:
        """Take the input after `input_norm`; returns what is to be added to `residual_TD` next.

        `residual_TD` is changed in place, so that the next norm is fused with the addition.
        """
        attended_TD = self.attention(normed_TD, cos_TA, sin_TA, kv_PJGCA, batch)
        y_TD: torch.Tensor = self.mlp(self.mlp_norm.add(attended_TD, residual_TD))
        return y_TD


class CausalLM(nn.Module):
    """Embedding, layers, final norm and LM head of one rank.

    `engine.models.build` makes it; its parameters are filled by `engine.weights.load`.
    """

    has_qk_norm: ClassVar[bool] = False

    def __init__(
        self, config: ModelConfig, *, axes: ParallelAxes, kernels: Kernels, rope: RotaryEmbedding
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self._rope = rope
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, size, name="model.embed_tokens", axis=axes.tp
        )
        self._sequence = tuple(
            DecoderLayer(config, index, has_qk_norm=self.has_qk_norm, axes=axes, kernels=kernels)
            for index in range(config.num_layers)
        )
        self.layers = nn.ModuleList(self._sequence)
        self.norm = RmsNorm(size, eps, name="model.norm", kernels=kernels)
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
        the collectives are, for each layer, one all-reduce after attention and one after the mlp.
        """
        self.kernels.begin_step(batch)
        cos_TA, sin_TA = self._rope.tables(batch)
        residual_TD = x_TD = self.embedding(batch.token_T)
        for index, layer in enumerate(self._sequence):
            norm = layer.input_norm
            normed_TD = norm(x_TD) if index == 0 else norm.add(x_TD, residual_TD)
            x_TD = layer(normed_TD, residual_TD, cos_TA, sin_TA, kv_pool.layer(index), batch)
        return self.norm.add(x_TD, residual_TD)

    @torch.inference_mode()
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """logits_BV in float32 of the hidden states that tokens are drawn from."""
        logits_BV: torch.Tensor = self.lm_head(hidden_BD)
        return logits_BV
