"""Next-token cross-entropy as (nll_sum, n_tokens), without ever holding the logits of all tokens.

Legend: N target positions, D model width, V vocabulary.

The loss of one position is −log p(target) = logsumexp(logits) − logits[target]. Two things about it are easy to get
wrong, and one is easy to make slow.

* It is returned as a *sum* and a *count*. Micro-batches hold different numbers of targets, so a mean of their means is
  not the mean; the division happens once, in `train.py`, by the count of the whole step.
* Only positions that have a target are computed at all. A prompt's position, or padding, contributes exactly zero.
* The logits are the largest tensor of a small model's step: 4,096 tokens × 32,000 ids in float32 are half a gigabyte,
  and as much again for their gradient. But the gradient at the logits has a closed form, softmax − one-hot, so each
  chunk of positions can be finished on the spot: logits, loss, gradient into `hidden` and `weight`, and forget them.
  The backward pass then only scales what is already there. Nothing is computed twice.

The plain version is `reference.cross_entropy`; the two are held together by

    python -m pytest tests/test_slow_twins.py -k loss

Source of the closed form: Goodfellow et al., "Deep Learning" (2016), section 6.2.2.3. Read next: `optim.py`.
"""

from typing import Any

import torch
from torch import Tensor

from minift.pack import IGNORE


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2_048) -> tuple[Tensor, Tensor]:
    """The summed negative log-likelihood of the targets, and their number.

    Args:
        hidden: [B, T, D], the model's final hidden states.
        weight: [V, D], the head.
        targets: int64 [B, T]; IGNORE where there is nothing to learn.
        chunk: positions whose logits exist at the same time.

    Returns:
        nll_sum: scalar, float32 (float64 for float64 input), in nats; differentiable once.
        n_tokens: int64 scalar.
    """
    keep = targets != IGNORE
    wanted = targets[keep]  # [N]
    if not torch.is_grad_enabled():
        weight = weight.detach()  # an evaluation: a custom function would prepare the parameter's gradient all the same
    nll_sum = _ChunkedCrossEntropy.apply(hidden[keep], weight, wanted, chunk)
    return nll_sum, keep.sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(hidden @ weightᵀ)[target], its gradients computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        device = hidden.device.type
        # A custom function sees its arguments as they are, so autocast's choice of dtype is made here by hand.
        matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.float64 if matmul_dtype == torch.float64 else torch.float32
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        nll_sum = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden, dtype=exact) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
        with torch.autocast(device, enabled=False):
            head = weight.to(matmul_dtype)  # [V, D]
            for start in range(0, len(targets), chunk):
                x = hidden[start : start + chunk].to(matmul_dtype)  # [n, D]
                target = targets[start : start + chunk, None]  # [n, 1]
                logits = (x @ head.T).to(exact)  # [n, V]
                log_total = logits.logsumexp(-1, keepdim=True)  # [n, 1]
                nll_sum += (log_total - logits.gather(1, target)).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad_logits = logits.sub_(log_total).exp_()  # softmax, in the logits' own memory
                grad_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact))  # − one-hot
                grad_logits = grad_logits.to(matmul_dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = grad_logits @ head
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nll_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_nll).to(hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_nll).to(weight_dtype)
        return grad_hidden, grad_weight, None, None
