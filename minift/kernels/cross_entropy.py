"""The chunked loss, with the passes over memory, the transposes and the shapes chosen for the device.

Plain twin: `loss.NextTokenLoss`. Taken always. What it does for the same numbers, to rounding:

* the logits of every chunk are in the same piece of memory: the system sets each new one to zero, which takes as
  long as the product that fills it; softmax and p − one-hot are computed in place;
* on a CPU a few rows go through all of it while its caches hold them, with one exponential for each logit;
* the head is transposed once in a step, where it is wide: a CPU multiplies by rows faster;
* in bfloat16 a CPU takes positions in multiples of ALIGNED, because kernels are made for each shape, and kept.

    python -m benchmarks loss            # every way to a loss: time, memory, and distance from float64
    python -m benchmarks ladder          # the rung "cross_entropy"

Legend: N positions that have a target, n of them at a time, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.loss import NextTokenLoss
from minift.pack import places_with_target
from minift.values import check_ids

ALIGNED = 64  # positions: 0.65 MB for the kernels of each shape, and the number of targets differs from step to step
SMALLEST = 1e-30  # a probability whose logarithm is exact: far below, float32 loses its digits, and then itself
CACHED = 2**20  # logits that a CPU takes through the softmax at a time: 4 MB in float32, which its caches hold
COLUMNS = 4_000  # columns of the head's gradient that a CPU adds to at a time
WIDE_HEAD = 2**14  # ids of a vocabulary from which a CPU is faster with the head transposed


class FusedNextTokenLoss(NextTokenLoss):
    """`NextTokenLoss`, with both passes tuned."""

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, n_targets: int | None = None) -> Tensor:
        """Return the summed negative log-likelihood of the targets, in nats. [B, T, D], [V, D], [B, T] → scalar."""
        places = places_with_target(targets, n_targets)
        states, targets = hidden.flatten(0, -2), targets.flatten()
        if len(places) < len(targets):
            states, targets = states[places], targets[places]  # [N, D], [N]
        check_ids(targets, len(weight))
        if not torch.is_grad_enabled():
            weight = weight.detach()  # or autograd would prepare the parameter's gradient all the same
        return cast(Tensor, _ChunkedCrossEntropy.apply(states, weight, targets, self.chunk))

    @torch.no_grad()
    def in_detail(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what `forward` computes and forgets, to the bit, chunk by chunk, under the same autocast.

        Yields:
            logits: [n, V], of the next n positions that have a target, in reading order.
            nll: [n], float32 (float64 of float64 input), in nats.
            gradient: [n, V], of these nll at these logits: p − one-hot. The next chunk overwrites it.
        """
        places = places_with_target(targets)
        n_targets = len(places)
        states, targets = _align(hidden.flatten(0, -2)[places], targets.flatten()[places])
        columns = _transposed(weight, _matmul_dtype(states))
        for here, _, gradient in _logits_by_chunk(states, columns, self.chunk):
            logits = gradient.clone()
            nll = nll_and_gradient_(gradient, targets[here, None])
            n = n_targets - here.start
            if n > 0:  # the rows after the last target fill the shape up
                yield logits[:n], nll[:n], gradient[:n]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(hidden @ weightᵀ)[target], with its gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        n_targets = len(hidden)
        hidden, targets = _align(hidden, targets)
        matmul_dtype = _matmul_dtype(hidden)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        nll = hidden.new_empty(len(hidden), dtype=_exact(matmul_dtype))
        grad_hidden = torch.empty_like(hidden, dtype=matmul_dtype) if needs_hidden else None
        grad_weight: Tensor | None = None
        ctx.transposed = _pays_to_transpose(weight)
        add = _add_transposed if ctx.transposed else _add_product
        with torch.autocast(hidden.device.type, enabled=False):
            columns = _transposed(weight, matmul_dtype)  # [D, V]
            for here, x, logits in _logits_by_chunk(hidden, columns, chunk):
                nll[here] = nll_and_gradient_(logits, targets[here, None])
                if grad_hidden is not None:
                    torch.mm(logits, columns.T, out=grad_hidden[here])
                if needs_weight:
                    grad_weight = add(grad_weight, x, logits)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:n_targets], grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nll[:n_targets].sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_dtype) * grad_nll.to(hidden_dtype)
        if grad_weight is not None:
            if ctx.transposed:
                grad_weight = _transpose(grad_weight, grad_weight.dtype).mul_(grad_nll)
            else:
                grad_weight = grad_weight * grad_nll
            grad_weight = grad_weight.to(weight_dtype)
        return grad_hidden, grad_weight, None, None


def _align(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Pad both with rows of zeros to a multiple of ALIGNED. Zeros change no gradient, and are cut off again."""
    spare = -len(hidden) % ALIGNED
    if not spare or hidden.device.type != "cpu" or _matmul_dtype(hidden) != torch.bfloat16:
        return hidden, targets
    return F.pad(hidden, (0, 0, 0, spare)), F.pad(targets, (0, spare))


def _add_product(total: Tensor | None, x: Tensor, logits: Tensor) -> Tensor:
    """Add to the head's gradient, [V, D], that of positions x, [n, D], with gradients at the logits, [n, V]."""
    product = logits.T @ x  # [V, D]
    return product.to(_exact(x.dtype)) if total is None else total.add_(product)


def _add_transposed(total: Tensor | None, x: Tensor, logits: Tensor) -> Tensor:
    """`_add_product` as [D, V], some columns at a time, so that what is added is never as large as the gradient."""
    D, V = x.shape[1], logits.shape[1]
    first = total is None
    if total is None:
        exact = _exact(x.dtype)
        # Rows of 49,152 numbers, 48 times 4 KiB, would all begin in the same few lines of a CPU's caches, and to
        # transpose them back would take 3 times as long: such rows are made a line longer.
        room = 16 if V * exact.itemsize % 4_096 == 0 else 0
        total = x.new_empty((D, V + room), dtype=exact)[:, :V]
    x = x.T.contiguous()  # [D, n]
    for start in range(0, V, COLUMNS):
        part = slice(start, start + COLUMNS)
        product = x @ logits[:, part]
        total[:, part].copy_(product) if first else total[:, part].add_(product)
    return total


def _pays_to_transpose(weight: Tensor) -> bool:
    """Return whether the head is transposed: up to 2 times as fast on a CPU if it is wide."""
    return weight.device.type == "cpu" and len(weight) >= WIDE_HEAD


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head as [D, V], in the dtype of its products."""
    return _transpose(weight, dtype) if _pays_to_transpose(weight) else weight.to(dtype).T


def _transpose(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the transpose, contiguous: copied in pieces, which the caches hold, in a third of the time of one call."""
    transposed = matrix.new_empty(matrix.T.shape, dtype=dtype)
    longer = 0 if len(matrix) >= len(transposed) else 1  # the dimension that is cut into pieces
    for to, piece in zip(transposed.split(1_000, 1 - longer), matrix.split(1_000, longer), strict=True):
        to.copy_(piece.T)
    return transposed


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the logits: a custom function sees its arguments as they are, so autocast is applied here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a loss is computed from logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits_by_chunk(hidden: Tensor, columns: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield which positions, their hidden states [n, D] and their logits [n, V], `chunk` positions at a time.

    Args:
        hidden: [N, D].
        columns: [D, V], the head transposed, in the dtype of the products.
    """
    N = len(hidden)
    memory = hidden.new_empty((min(chunk, N), columns.shape[1]), dtype=columns.dtype)  # the same for every chunk
    for start in range(0, max(N, 1), chunk):  # without positions there is one empty chunk: its gradients are zeros
        here = slice(start, min(start + chunk, N))
        x = hidden[here].to(columns.dtype)
        yield here, x, torch.mm(x, columns, out=memory[: len(x)])


def nll_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nll of some positions, [n], and overwrite their logits, [n, V], with p − one-hot.

    Args:
        targets: int64 [n, 1].
    """
    return (_by_cached_rows_ if logits.device.type == "cpu" else _all_rows_at_once_)(logits, targets)


def _all_rows_at_once_(logits: Tensor, targets: Tensor) -> Tensor:
    """`nll_and_gradient_` in the fewest passes over memory, which is what takes a GPU's time."""
    log_p = logits.to(_exact(logits.dtype))  # of logits that are exact already, no copy
    torch.log_softmax(log_p, -1, out=log_p)
    nll = -log_p.gather(1, targets)  # [n, 1]
    torch.exp(log_p, out=logits)
    logits.scatter_(1, targets, torch.expm1(-nll).to(logits.dtype))  # p − 1, rounded once
    return nll[:, 0]


def _by_cached_rows_(logits: Tensor, targets: Tensor) -> Tensor:
    """`nll_and_gradient_` with one exponential for each logit, which is what takes a CPU's time.

    A few rows go through all of it while its caches hold them.
    """
    (n, V), exact = logits.shape, _exact(logits.dtype)
    rows = max(1, CACHED // V)
    nll = logits.new_empty(n, dtype=exact)
    memory = logits.new_empty((min(rows, n), V), dtype=exact)
    for start in range(0, n, rows):
        target = targets[start : start + rows]
        raw = logits[start : start + rows]
        x = memory[: len(target)].copy_(raw)
        x = torch.softmax(x, -1, out=x)
        p = x.gather(1, target)
        if bool((p > SMALLEST).all()):
            nll[start : start + rows] = -p.log()[:, 0]
        else:  # the largest probability is exp(largest logit) / total, and never 0, as the target's may be in float32
            log_total = raw.amax(-1, keepdim=True).to(exact) - x.amax(-1, keepdim=True).log()
            nll[start : start + rows] = (log_total - raw.gather(1, target))[:, 0]
        x.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact))  # − one-hot
        logits[start : start + rows] = x
    return nll
