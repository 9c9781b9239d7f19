"""The video DiT: patch embedding, conditioning, blocks, head; a module is one pipeline stage (or virtual chunk)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron_video.dit import offload, recompute
from megatron_video.dit.config import DiTConfig
from megatron_video.dit.context_parallel import RINGS, TokenLayout
from megatron_video.dit.embedders import PatchEmbedding, TextProjection, TimeConditioning, padded_text
from megatron_video.dit.layer import DiTLayer
from megatron_video.dit.norms import mark_sequence_parallel
from megatron_video.dit.packing import Packing, by_sample, cuts
from megatron_video.dit.rope import Rope, build_rope, joined
from megatron_video.dit.specs import LayerSpec
from megatron_video.dit.stage import Stage
from megatron_video.errors import UserError
from megatron_video.fp8 import building_layer, running_layer, running_layers, token_multiple

ActivationWatch = Callable[[str, Tensor, TokenLayout], None]
"""(part of the model, hidden states [s, b, D] of this rank after it, which tokens they are)."""


class OutputHead(nn.Module):
    """LayerNorm without affine, (shift, scale) = table + time embedding, linear to patches (reference 1.3, step 6)."""

    def __init__(self, dit: DiTConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_eps = dit.norm_eps
        self.modulation_table = nn.Parameter(torch.empty(2, dit.hidden_size, dtype=config.params_dtype))
        self.projection = nn.Linear(dit.hidden_size, dit.out_channels * dit.patch_size**2, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[s, b, D] tokens and [b, D] time embedding -> [s, b, p * p * C]."""
        shift, scale = (self.modulation_table[:, None, :] + embedding).unsqueeze(1)
        normed = F.layer_norm(x, x.shape[-1:], eps=self.norm_eps)
        return self.projection(torch.addcmul(shift, normed, scale + 1))


class VideoDiT(MegatronModule):
    """One stage of the DiT. Between stages travels one tensor, the hidden states [s, b, D] of this rank's tokens."""

    share_embeddings_and_output_weights = False  # megatron-core asks when it reduces embedding gradients
    model_type = ModelType.encoder_or_decoder  # and its schedules for this

    def __init__(
        self, dit: DiTConfig, config: TransformerConfig, spec: LayerSpec, stage: Stage, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.dit_config, self.stage, self.groups = dit, stage, groups
        self.pre_process, self.post_process, self.vp_stage = stage.is_first, stage.is_last, stage.virtual_stage
        self.patch_embedding = PatchEmbedding(dit, config) if stage.is_first else None
        self.time_conditioning = TimeConditioning(dit, config, spec, groups)
        self.text_projection = TextProjection(dit, config)

        def layer(number: int) -> DiTLayer:
            with building_layer(config, number):
                return DiTLayer(config, spec, number + 1, groups, stage.recomputed_modules)

        # Keyed by the layer's number in the whole model: names are the same under every pipeline layout.
        self.layers = nn.ModuleDict({str(i): layer(i) for i in stage.layer_numbers})
        self.head = OutputHead(dit, config) if stage.is_last else None
        self.token_multiple = self._needed_multiple()
        self._input_tensor: Tensor | None = None
        self.activation_watch: ActivationWatch | None = None
        """Told of the residual stream after the embedding and after every layer; None on steps that do not measure."""
        self._mark_replicated_embedders()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the previous stage (called by megatron-core's schedules)."""
        self._input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        latents: Any,
        timestep: Any,
        llm_states: Any,
        clip_states: Any = None,
        text_lengths: Any = None,
        fps: Any = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the velocity data - noise at `latents`.

        Every argument but the last may be a list, with an entry for every part: then all samples of all parts share one
        sequence, without seeing each other, and a list of velocities is returned. Text lengths are given on the host.

        Args:
            latents: noised latents [b, T, C, h, w]; later stages read only their shape.
            timestep: fp32 [b] in [0, 1), 0 = noise.
            llm_states: Step-LLM states [b, L1, d1], padded on the right; `clip_states` [b, L2, d2], all slots.
            text_lengths: int [b], number of visible text tokens (L2 + real Step-LLM tokens); None if all are visible.
            fps: [b], with additional conditions.
            dropout_seeds: int64 [b], a fresh number for every sample and step; needed to train with hidden_dropout.

        Returns:
            Velocity [b, T, C_out, h, w] on the last stage, else hidden states [s, b, D] of this rank's tokens.

        Raises:
            UserError: latents whose height or width is not a multiple of the patch size.
        """
        if not isinstance(latents, Tensor):
            return self._forward_packed(latents, timestep, llm_states, clip_states, text_lengths, fps)
        grid = self._patched_grid(latents)
        embedding, modulation = self.time_conditioning(timestep, grid, fps)
        text = self.text_projection(llm_states, clip_states)
        text, hidden_text = padded_text(text, text_lengths, self.token_multiple)
        x = self._embed(self._patches(latents)) if self.stage.is_first else self._received()
        layout = self._token_layout(self._rope(grid, text))
        if self.activation_watch is not None and self.stage.is_first:
            self.activation_watch("patch_embedding", x, layout)
        inputs = (modulation, text, hidden_text, self._checked_seeds(dropout_seeds))
        x = self._run_layers(x, *inputs, tokens=layout)
        return self._velocity(self._predict(x, embedding, layout), grid) if self.stage.is_last else x

    def _forward_packed(
        self,
        latents: Sequence[Tensor],
        timestep: Sequence[Tensor],
        llm_states: Sequence[Tensor],
        clip_states: Sequence[Tensor | None],
        text_lengths: Sequence[Tensor],
        fps: Sequence[Tensor | None],
    ) -> Tensor | list[Tensor]:
        """`forward` of several parts as one sequence of their samples."""
        if self.training and self.dit_config.hidden_dropout > 0:
            raise ValueError(
                f"hidden_dropout={self.dit_config.hidden_dropout}: its masks are not those of packed samples"
            )
        grids = [self._patched_grid(part) for part in latents]
        conditions = [self.time_conditioning(*part) for part in zip(timestep, grids, fps, strict=True)]
        embedding, modulation = (torch.cat(each) for each in zip(*conditions, strict=True))
        texts = [
            # Visible tokens alone, so that no key needs to be hidden.
            text[:length, row]
            for llm, clip, lengths in zip(llm_states, clip_states, text_lengths, strict=True)
            for text in [self.text_projection(llm, clip)]
            for row, length in enumerate(lengths.tolist())
        ]
        text, _ = padded_text(torch.cat(texts).unsqueeze(1), None, self.token_multiple)
        ropes = [self._rope(grid, text) for grid, part in zip(grids, latents, strict=True) for _ in part]
        layout = self._token_layout(joined(ropes), [len(rope.cos) for rope in ropes], [len(each) for each in texts])
        x = self._embed_all(latents) if self.stage.is_first else self._received()
        if self.activation_watch is not None and self.stage.is_first:
            self.activation_watch("patch_embedding", x, layout)
        x = self._run_layers(x, modulation, text, None, None, tokens=layout)
        if not self.stage.is_last:
            return x
        out = self._predict(x, embedding, layout)[: layout.count]
        sizes = [len(part) * math.prod(grid) for part, grid in zip(latents, grids, strict=True)]
        return [
            self._velocity(tokens.view(len(part), -1, tokens.shape[-1]).transpose(0, 1), grid)
            for tokens, part, grid in zip(out.split(sizes), latents, grids, strict=True)
        ]

    def _embed_all(self, latents: Sequence[Tensor]) -> Tensor:
        """[b, T, C, h, w] each -> this rank's tokens [s, 1, D] of all samples behind one another."""
        return self._embed(torch.cat([self._patches(part).transpose(0, 1).flatten(0, 1) for part in latents])[:, None])

    def padded_tokens(self, tokens: int) -> int:
        """`tokens` rounded up so that every rank gets equally many, and as many as FP8 and a ring can handle."""
        parts = self.groups.cp.size() * self._sequence_parts() * self.token_multiple
        return -(-tokens // parts) * parts

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Distributed-checkpoint view: every tensor under its name in the whole model, each with one main replica."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            if name == "layers":
                for number, layer in self.layers.items():
                    state |= sharded_state_dict_default(layer, f"{prefix}layers.{number}.", sharded_offsets, metadata)
                continue
            part = sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.groups.tp
            )
            if name in ("time_conditioning", "text_projection"):
                self._number_replicas(part)
            state |= part
        return state

    def _run_layers(self, x: Tensor, *inputs: Tensor | None, tokens: TokenLayout) -> Tensor:
        config = self.config
        if config.fp8 and not torch.is_grad_enabled():
            # Outside of training nobody else says that weights may have changed since they were cast to FP8.
            self.set_is_first_microbatch()
        offload.start_micro_batch(self, config, self.vp_stage)
        with running_layers(config):
            for position, (number, layer) in enumerate(self.layers.items()):
                recomputed = self.training and position < self.stage.recomputed_layers
                run = partial(self._run_layer, layer, tokens=tokens)
                x = recompute.run(run, x, *inputs, recompute=recomputed, fp8=bool(config.fp8))
                # Outside of what is computed again in backward, so that nothing counts twice.
                if self.activation_watch is not None:
                    self.activation_watch(f"layers.{number}", x, tokens)
        return x

    @staticmethod
    def _run_layer(layer: nn.Module, *inputs: Any, tokens: TokenLayout) -> Tensor:
        assert isinstance(layer, DiTLayer)
        with running_layer(layer.config, layer.layer_number - 1):
            output: Tensor = layer(*inputs, tokens=tokens)
        return output

    def _patches(self, latents: Tensor) -> Tensor:
        """[b, T, C, h, w] -> [tokens, b, C * p * p], t major, then row, then column."""
        p = self.dit_config.patch_size
        b, t, c, h, w = latents.shape
        patches = latents.view(b, t, c, h // p, p, w // p, p).permute(1, 3, 5, 0, 2, 4, 6)
        return patches.reshape(t * (h // p) * (w // p), b, c * p * p)

    def _embed(self, patches: Tensor) -> Tensor:
        """[tokens, b, C * p * p] -> this rank's tokens [s, b, D]."""
        patches = F.pad(patches, (0, 0, 0, 0, 0, self.padded_tokens(len(patches)) - len(patches)))
        patches = patches.chunk(self.groups.cp.size())[self.groups.cp.rank()]
        if self.config.sequence_parallel:
            patches = patches.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        assert self.patch_embedding is not None
        return self.patch_embedding(patches)

    def _received(self) -> Tensor:
        received, self._input_tensor = self._input_tensor, None
        assert received is not None, "set_input_tensor must come before forward on a later stage"
        # Not held here: every chunk would keep the last one, and its gradient, through the whole step.
        return received

    def _predict(self, x: Tensor, embedding: Tensor, layout: TokenLayout) -> Tensor:
        """This rank's tokens [s, b, D] -> all tokens [s, b, p * p * C], padding included."""
        assert self.head is not None
        if self.config.sequence_parallel:
            # The head sees this rank's tokens only, so the embedding's gradient is summed over the ranks.
            embedding = copy_to_tensor_model_parallel_region(embedding, group=self.groups.tp)
        if layout.packing is None:
            out = self.head(x, embedding)
        else:
            head = self.head
            out = by_sample(lambda x, own: head(x, own[0]), [x], [embedding[None]], layout.packing.held)
        if self.config.sequence_parallel:
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.groups.tp)
        # Every context-parallel rank computes the whole loss, so gradients and counts come out times their number.
        if self.groups.cp.size() > 1:
            out = gather_from_sequence_parallel_region(out, group=self.groups.cp)
        return out

    def _velocity(self, out: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[s, b, p * p * C] -> [b, T, C, h, w], without the padding."""
        t, rows, columns = grid
        p, b = self.dit_config.patch_size, out.shape[1]
        out = out[: t * rows * columns].view(t, rows, columns, b, p, p, -1)
        return out.permute(3, 0, 6, 1, 4, 2, 5).reshape(b, t, -1, rows * p, columns * p)

    def _needed_multiple(self) -> int:
        """Tokens of one rank come in multiples of this."""
        ring = self.groups.cp.size() > 1 and self.config.cp_comm_type in RINGS
        # Transformer Engine cuts every rank's tokens in halves under a ring.
        return math.lcm(token_multiple(self.config), 2 if ring else 1)

    def _sequence_parts(self) -> int:
        return self.groups.tp.size() if self.config.sequence_parallel else 1

    def _rope(self, grid: tuple[int, int, int], like: Tensor) -> Rope:
        split = tuple(self.dit_config.rope_channel_split or ())
        return build_rope(grid, split, like.dtype, like.device, self.dit_config.released_precision)

    def _token_layout(self, rope: Rope, videos: Sequence[int] | None = None, texts: Sequence[int] = ()) -> TokenLayout:
        """This rank's tokens of a sequence with these rotary tables; `videos`, `texts`: of samples that share it."""
        tokens, cp = len(rope.cos), self.groups.cp
        padded = self.padded_tokens(tokens)
        gathered = first = cp.rank() * padded // cp.size()
        held = padded // cp.size() // self._sequence_parts()
        if self.config.sequence_parallel:
            first += self.groups.tp.rank() * held
        packing = None
        if videos is not None:
            all_held = cuts(videos, first, held), cuts(videos, gathered, padded // cp.size())
            packing = Packing(tuple(videos), tuple(texts), *all_held)
        return TokenLayout(rope.of_rank(padded, cp.rank(), cp.size()), tokens, first, packing)

    def _checked_seeds(self, seeds: Tensor | None) -> Tensor | None:
        if not self.training or self.dit_config.hidden_dropout == 0:
            return None
        if seeds is None:
            raise ValueError(f"training with hidden_dropout={self.dit_config.hidden_dropout} needs dropout_seeds")
        return seeds

    def _patched_grid(self, latents: Tensor) -> tuple[int, int, int]:
        p = self.dit_config.patch_size
        _, frames, channels, height, width = latents.shape
        if channels != self.dit_config.in_channels:
            raise UserError(
                f"latents have {channels} channels, the model takes in_channels={self.dit_config.in_channels}"
            )
        if height % p or width % p:
            raise UserError(f"latents of {height} x {width} do not divide by patch_size={p}")
        return frames, height // p, width // p

    def _mark_replicated_embedders(self) -> None:
        """Every stage has the embedders: their gradients are summed over stages, their norm is counted once."""
        for module in (self.time_conditioning, self.text_projection):
            for parameter in module.parameters():
                parameter.pipeline_parallel = True  # type: ignore[union-attr]
                parameter.shared = not self.stage.is_first  # type: ignore[union-attr]
                # A gradient bucket of its own: ZeRO-1 then cuts it over replicas at the same elements on every stage.
                # Otherwise the sum over stages, which comes after the reduce-scatter, adds unreduced elements.
                parameter.shared_embedding = self.stage.count > 1  # type: ignore[union-attr]

    def _number_replicas(self, part: dict[str, Any]) -> None:
        for tensor in part.values():
            if isinstance(getattr(tensor, "replica_id", None), tuple):
                tensor.replica_id = (self.stage.number, *tensor.replica_id[1:])
