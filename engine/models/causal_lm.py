"""A decoder-only language model over the paged KV cache: one class, built as its form says.

Shape suffixes: T tokens of this step, B sequences, D model dim, V vocabulary, A head dim, P blocks
in the pool, J key then value, G KV heads, C slots in a block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Protocol

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import FusedLayers, HeadShape, Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.moe import ExpertLoad, MoeMlp
from engine.layers.norm import RmsNorm
from engine.layers.rope import RotaryEmbedding
from engine.models.decoder_layer import DecoderLayer
from engine.models.token_run import TokenRun, token_runs
from engine.parallel.axes import ParallelAxes
from engine.parallel.expert_placement import ExpertPlacement
from engine.parallel.heads import head_split
from engine.parallel.overlap import num_overlapped
from engine.parallel.stages import stage_layers
from engine.parallel.vocabulary import LmHead, VocabParallelEmbedding

_EMBEDDING = "model.embed_tokens"


class KvLayers(Protocol):
    """What a forward pass needs of a KV pool."""

    def layer(self, index: int) -> torch.Tensor:
        """Return kv_PJGCA of one of this rank's layers, from 0: a view, written in place."""


class CausalLM(nn.Module):
    """What stands on one rank: layers, the embedding on the first stage, the LM head on the last.

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
        placements: Mapping[int, ExpertPlacement],
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.dtype = torch.get_default_dtype()
        """Of the residual; most parameters are packed away."""
        self._rope = rope
        self._local_rope = local_rope
        heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self.kv_heads = head_split(heads, axes.tp.size, axes.tp.rank).kv_heads
        """This rank's KV heads, counted over the whole model."""
        self.sequence = axes.sp
        """The ranks among which the tokens of a step may be split."""
        self.kv_exchange = axes.kv_exchange
        ranges = stage_layers(
            config,
            axes.pp.size,
            axes.pp.rank,
            axes.interleave,
            is_for_prompts=axes.is_for_prompts,
        )
        self._tp, self._data = axes.tp, axes.dp
        self.num_ranges = len(ranges)
        """How often a token comes through this rank."""
        self.stage_layers = tuple(index for layers in ranges for index in layers)
        """This rank's layers, counted over the whole model."""
        self.is_first_stage = axes.pp.rank == 0
        self.is_last_stage = axes.pp.rank == axes.pp.size - 1
        self.embedding: VocabParallelEmbedding | None = None
        if self.is_first_stage:
            self.embedding = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, name=_EMBEDDING, axis=axes.tp
            )
        layers = [
            DecoderLayer(config, index, axes=axes, kernels=kernels, placement=placements.get(index))
            for index in self.stage_layers
        ]
        starts = [0, *accumulate(len(span) for span in ranges)]
        self._ranges = tuple(
            tuple((place, layers[place]) for place in range(start, stop))
            for start, stop in pairwise(starts)
        )
        self.layers = nn.ModuleList(layers)
        self.norm: RmsNorm | None = None
        self.lm_head: LmHead | None = None
        if self.is_last_stage:
            self.norm = RmsNorm(config.hidden_size, config, name="model.norm", kernels=kernels)
            self.lm_head = LmHead(
                config.vocab_size,
                config.hidden_size,
                name=_EMBEDDING if config.tie_word_embeddings else "lm_head",
                tied_to=self.embedding if config.tie_word_embeddings else None,
                axis=axes.tp,
                kernels=kernels,
            )

    @torch.inference_mode()
    def forward(
        self,
        batch: StepBatch,
        kv_pool: KvLayers,
        residual_TD: torch.Tensor | None = None,
        range_index: int = 0,
        *,
        on_layer: Callable[[int], None] | None = None,
        told: range = range(0),
    ) -> torch.Tensor:
        """Run one range of this stage's layers, and write their keys and values to the pool.

        Calls `kernels.begin_step`. Every rank of the tensor axis must call it with the same batch;
        the collectives are one all-reduce after the embedding and those of `DecoderLayer`, layer
        after layer, and in a layer half after half, and in a half part after part of the batch.

        Args:
            batch: the same on all stages; only the first looks at its token ids. Ranks of the
                sequence axis may have different ones: see `StepBatch.split`.
            kv_pool: of this rank's layers.
            residual_TD: what the stage before returned; it is changed in place. None for the
                model's first layers.
            range_index: of `num_ranges`, one after the other.
            on_layer: told of layers, by their places in the pool, when their keys and values and
                all before them are there.
            told: how many layers are there when it is called.

        Returns:
            After the model's last layer hidden_TD for `logits`; else residual_TD for the stage
            after, or for the first one's next range.
        """
        self.kernels.begin_step(batch)
        tables = self._rope.tables(batch)
        if self.embedding is not None and range_index == 0:
            residual_TD = self._scaled(self.embedding(batch.token_T))
        assert residual_TD is not None, "the stage before hands its residual on"
        fused = self._fused_ranges[range_index]
        if fused is not None:
            places = [place for place, _ in self._ranges[range_index]]
            kv_LPJGCA = [kv_pool.layer(place) for place in places]
            added_TD = fused(
                residual_TD,
                *tables,
                kv_LPJGCA,
                stops=[] if on_layer is None else _stops(places, told),
                on_stop=None if on_layer is None else lambda stop: on_layer(places[stop - 1]),
            )
        else:
            local_tables = tables if self._local_rope is None else self._local_rope.tables(batch)
            runs = token_runs(batch, residual_TD, tables, local_tables)
            for place, layer in self._ranges[range_index]:
                for run in self._turns(runs):
                    cos_TA, sin_TA = run.local_tables if layer.has_local_rope else run.tables
                    run.add = layer.attend(
                        run.add, run.residual_TD, cos_TA, sin_TA, kv_pool.layer(place), run.batch
                    )
                for run in self._turns(runs):
                    assert run.add is not None
                    run.add = layer.feed(run.add, run.residual_TD, run.batch)
                if on_layer is not None and place + 1 in told:
                    on_layer(place)
            added = [run.add() for run in runs if run.add is not None]
            added_TD = added[0] if len(added) == 1 else torch.cat(added)
        if self.norm is None or range_index < self.num_ranges - 1:
            return residual_TD.add_(added_TD)
        return self.norm.add(added_TD, residual_TD)

    def num_parts(self, num_tokens: int) -> int:
        """Into how many `StepBatch.parts` a step is best cut; alike on all ranks of a stage.

        Experts that are spread over data shards, and tokens that are split over ranks, have an
        exchange of their own in each layer: it would have to be cut alike on all of them.
        """
        is_plain = self.sequence.size == 1 and self._data.size == 1
        return num_overlapped(self._tp, num_tokens) if is_plain else 1

    def _turns(self, runs: Sequence[TokenRun]) -> Iterator[TokenRun]:
        """One run after the other, while what those before have begun to sum travels."""
        for run in runs:
            if len(runs) > 1:
                self.kernels.begin_step(run.batch)
            yield run

    @cached_property
    def _fused_ranges(self) -> tuple[FusedLayers | None, ...]:
        """Each range's layers in one call, if all are plain and the kernels have it; else None.

        Found out at the first step, when weights are packed.
        """
        return tuple(self._fused([layer for _, layer in layers]) for layers in self._ranges)

    def _fused(self, layers: Sequence[DecoderLayer]) -> FusedLayers | None:
        halves = [both for layer in layers if (both := layer.halves()) is not None]
        return self.kernels.fuse_layers(halves) if len(halves) == len(layers) else None

    @torch.inference_mode()
    def serve(self, device: torch.device, range_index: int = 0) -> None:
        """Take part in the experts' exchange of a forward pass of ranks that have tokens.

        Every rank of a data shard without tokens calls it in place of `forward`.
        """
        nothing_TD = torch.empty((0, self.config.hidden_size), dtype=self.dtype, device=device)
        for _, layer in self._ranges[range_index]:
            if isinstance(layer.mlp, MoeMlp):
                layer.mlp.serve(nothing_TD)

    @property
    def expert_loads(self) -> dict[int, ExpertLoad]:
        """Of each layer here that is a mixture, by its number in the whole model."""
        return {
            index: layer.mlp.load
            for index, (_, layer) in zip(self.stage_layers, chain(*self._ranges), strict=True)
            if isinstance(layer.mlp, MoeMlp)
        }

    @torch.inference_mode()
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """logits_BV in float32 of the hidden states that tokens are drawn from; last stage only."""
        assert self.lm_head is not None, "the last stage has the LM head"
        logits_BV: torch.Tensor = self.lm_head(hidden_BD)
        form = self.config.form
        if form.logit_scale != 1.0:
            logits_BV *= form.logit_scale
        if form.logit_cap is not None:
            logits_BV = logits_BV.div_(form.logit_cap).tanh_().mul_(form.logit_cap)
        return logits_BV

    def _scaled(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Times a factor of the weights' own precision, as Gemma was trained."""
        if self.config.form.embedding_scale != 1.0:
            x_TD *= torch.tensor(self.config.form.embedding_scale, dtype=x_TD.dtype).item()
        return x_TD


def _stops(places: Sequence[int], told: range) -> list[int]:
    """After how many of the layers at `places` one has come that is to be told of."""
    return [index + 1 for index, place in enumerate(places) if place + 1 in told]
