"""Next-token cross-entropy as a sum, without ever holding the logits of all tokens.

Legend: B batch, T tokens, N positions that have a target, n of them at a time, D model width, V vocabulary.

The loss of one position is −log p(target) = logsumexp(logits) − logits[target], in nats. Three things about it:

* It is a *sum*. Micro-batches hold different numbers of targets, so a mean of their means is not the mean; `train.py`
  divides once, by the number of targets of the whole step.
* A position without a target (one of the prompt, or padding) is left out before anything is computed.
* The logits are the largest tensor of the step: 4,096 tokens × 32,000 ids in float32 are half a gigabyte, and so is
  their gradient. But that gradient has a closed form, p − one-hot: the probabilities, less 1 at the right token. So a
  chunk of positions is finished at once and forgotten, and the backward pass only scales what is already there.

The same numbers sooner: `kernels/cross_entropy.py`. Source: Goodfellow et al., "Deep Learning" (2016), 6.2.2.3.
Read next: `optim.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minift.config import LOSS_CHUNK
from minift.pack import places_with_target
from minift.values import check_ids


def next_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = LOSS_CHUNK, n_targets: int | None = None
) -> Tensor:
    """Return the summed negative log-likelihood of the targets, in nats: a scalar, float32 (float64 of float64).

    Args:
        hidden: [B, T, D], the model's final hidden states.
        weight: [V, D], the head.
        targets, n_targets: int64 [B, T], IGNORE where there is nothing to learn; and N, where it is known.
        chunk: positions whose logits exist at the same time.
    """
    places = places_with_target(targets, n_targets)
    hidden, targets = hidden.flatten(0, -2)[places], targets.flatten()[places]  # [N, D], [N]
    check_ids(targets, len(weight))
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)


def nll_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each position's loss, [n], and its gradient at the logits, [n, V]: p − one-hot. targets: int64 [n]."""
    rows = torch.arange(len(targets), device=targets.device)
    log_p = logits.log_softmax(-1)
    gradient = log_p.exp()  # p …
    gradient[rows, targets] -= 1  # … − one-hot
    return -log_p[rows, targets], gradient


class ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(hidden @ weightᵀ)[target], with its gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        nll = torch.zeros(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(targets), chunk):
            here = slice(start, start + chunk)
            logits = (hidden[here] @ weight.T).to(nll.dtype)  # [n, V]
            nll[here], grad_logits = nll_and_gradient(logits, targets[here])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[here] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[here]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return nll.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_nll, grad_weight * grad_nll, None, None


class NextTokenLoss(nn.Module):
    """`next_token_loss` as a module, so that a faster one can take its place."""

    def __init__(self, chunk: int = LOSS_CHUNK):
        super().__init__()
        self.chunk = chunk

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, n_targets: int | None = None) -> Tensor:
        return next_token_loss(hidden, weight, targets, self.chunk, n_targets)
