"""The last layer's feed-forward network, the last norm and the loss, for positions with a target alone.

Plain twins: `train.Objective` and the last `model.DecoderLayer`. Taken where at most FEW of a batch's positions have a
target, as in finetuning, where prompts have none: attention needs every position of the last layer's input, but after
it no other position reads what a position without a target would compute. On the bundled task half of the positions
have none, and that is 7 % of a step (two cores of an AMD EPYC).

    python -m benchmarks ladder          # the rung "targets"

Legend: B batch, T tokens, N positions that have a target, D model width.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from minift.model import DecoderLayer, Shared, check_input
from minift.pack import Batch, places_with_target
from minift.train import Objective

FEW = 0.9  # the share of positions with a target up to which the others are left out
ALIGNED = 64  # the number of positions is filled up to a multiple: CPU kernels are made, and kept, for each shape


class TargetsLayer(DecoderLayer):
    """A layer that can leave out the feed-forward network of positions that are not asked for."""

    def forward(self, x: Tensor, shared: Shared, places: Tensor | None = None) -> Tensor:
        """[B, T, D] → [B, T, D], or [n, D] of the places, int64 [n] in the flattened batch (b · T + t)."""
        x = x + self.self_attn(self.input_layernorm(x), shared)
        if places is not None:
            x = x.flatten(0, 1).index_select(0, places)
        return x + self.mlp(self.post_attention_layernorm(x))


class TargetsObjective(Objective):
    """`Objective` of a model of `TargetsLayer`s, the last of which leaves positions out."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss of a micro-batch, a scalar, in nats."""
        hidden, targets = self.states(batch)
        return cast(Tensor, self.loss(hidden, self.model.head_weight, targets, batch.n_targets))

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return final hidden states and their targets: [1, N, D] and [1, N], or of many, [B, T, D] and [B, T]."""
        model = self.model
        check_input(batch.tokens, batch.positions, None, model.config)
        if batch.n_targets > FEW * batch.targets.numel() or not isinstance(model.layers[-1], TargetsLayer):
            return model.hidden(batch.tokens, batch.positions, batch.documents), batch.targets
        places = places_with_target(batch.targets, batch.n_targets)  # [N]
        padded = F.pad(places, (0, -len(places) % ALIGNED))  # with place 0; what comes of it is cut off again
        x = model.embed_tokens(batch.tokens)
        shared = model.prepare(batch.tokens, batch.positions, batch.documents, None)
        *layers, last = model.layers
        for layer in layers:
            x = model.through(layer, x, shared)
        hidden = model.norm(model.through(last, x, shared, padded))[: len(places)]
        return hidden[None], batch.targets.flatten()[places][None]
