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

    python -m pytest tests/way/test_slow_twins.py -k loss

and `python -m benchmarks loss` measures it beside PyTorch's own, which is chunked, too.

Source of the closed form: Goodfellow et al., "Deep Learning" (2016), section 6.2.2.3. Read next: `optim.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.config import LOSS_CHUNK, WIDE_HEAD
from minift.model import Llama, check_ids
from minift.pack import IGNORE, Batch

# On a CPU positions are taken in multiples of it in bfloat16: for each shape a kernel is made, and kept as long as the
# process lives, 0.65 MB each; and the number of targets differs from step to step.
ALIGNED = 64
FEW = 0.9  # the share of positions with a target up to which the model is told which they are
SMALLEST = 1e-30  # a probability whose logarithm is exact: far below, float32 loses its digits, and then itself
CACHED = 2**20  # logits that a CPU takes through the softmax at a time: 4 MB in float32, which its caches hold
COLUMNS = 4_000  # of the head's gradient that a CPU adds to at a time


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = LOSS_CHUNK) -> tuple[Tensor, Tensor]:
    """The summed negative log-likelihood of the targets, and their number.

    Args:
        hidden: [B, T, D], the model's final hidden states.
        weight: [V, D], the head.
        targets: int64 [B, T]; IGNORE where there is nothing to learn.
        chunk: positions whose logits exist at the same time.

    Returns:
        nll_sum: scalar, float32 (float64 for float64 input), in nats; differentiable once.
        n_tokens: int64 scalar.

    Raises:
        InputError: on a CPU, for a target that is not in the vocabulary.
    """
    keep = targets != IGNORE
    n_tokens = keep.sum()
    wanted, states = targets.flatten(), hidden.flatten(0, -2)
    if int(n_tokens) < len(wanted):
        wanted, states = targets[keep], hidden[keep]  # [N], [N, D]
    if wanted.device.type == "cpu":
        check_ids(wanted, len(weight))
    if not torch.is_grad_enabled():
        weight = weight.detach()  # an evaluation: a custom function would prepare the parameter's gradient all the same
    nll_sum = _ChunkedCrossEntropy.apply(states, weight, wanted, chunk)
    return nll_sum, n_tokens


def batch_loss(model: Llama, batch: Batch, chunk: int = LOSS_CHUNK) -> tuple[Tensor, Tensor]:
    """(nll_sum, n_tokens) of one micro-batch."""
    hidden, targets = batch_states(model, batch)
    return next_token_loss(hidden, model.head_weight, targets, chunk)


def batch_states(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """The final hidden states of a micro-batch, and what should follow them: what its loss is computed from.

    Returns:
        [B, T, D] and [B, T]; or where many positions have no target, those that have one: [1, N, D] and [1, N]. What
        only the others would need is then not computed.
    """
    if batch.n_targets > FEW * batch.targets.numel():
        return batch_hidden(model, batch), batch.targets
    targets = batch.targets.flatten()
    wanted = (targets != IGNORE).nonzero()[:, 0]  # [N]
    # Whatever stands at place 0 fills it up to a shape that has its kernels; what comes of it is cut off again.
    hidden = batch_hidden(model, batch, F.pad(wanted, (0, -len(wanted) % ALIGNED)))[: len(wanted)]
    return hidden[None], targets[wanted][None]


def batch_hidden(model: Llama, batch: Batch, wanted: Tensor | None = None) -> Tensor:
    """The final hidden states of a micro-batch, [B, T, D]: documents are kept apart where it is isolated.

    Args:
        wanted: as `Llama.hidden` takes it; it then returns [N, D].
    """
    documents = batch.document_ids if batch.isolated else None
    return model.hidden(batch.tokens, batch.positions, documents, wanted=wanted)


@torch.no_grad()
def loss_in_detail(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = LOSS_CHUNK
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `next_token_loss` goes through and forgets: the same numbers to the bit, for people to look at.

    Args:
        hidden, weight, targets, chunk: as for `next_token_loss`, under the same autocast.

    Yields:
        logits: [n, V], of the next n positions that have a target, in reading order.
        nll: [n], float32 (float64 for float64 input), in nats.
        gradient: [n, V], of these nll at these logits: softmax − one-hot.
    """
    keep = targets != IGNORE
    states, wanted = _aligned(hidden[keep], targets[keep])
    n_targets = int(keep.sum())
    columns = _transposed(weight, _matmul_dtype(states))
    for here, _, gradient in _logits_by_chunk(states, columns, chunk):
        logits = gradient.clone()
        nll = _nll_and_gradient_(gradient, wanted[here, None])
        n = n_targets - here.start
        if n > 0:  # behind it are rows of nobody's
            yield logits[:n], nll[:n], gradient[:n]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(hidden @ weightᵀ)[target], its gradients computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        n = len(hidden)
        hidden, targets = _aligned(hidden, targets)
        N = len(hidden)
        matmul_dtype = _matmul_dtype(hidden)
        exact = _exact(matmul_dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        nll = hidden.new_empty(N, dtype=exact)
        grad_hidden = torch.empty_like(hidden, dtype=matmul_dtype) if want_hidden else None
        grad_weight: Tensor | None = None
        ctx.turned = _pays_to_turn(weight)
        add = _add_turned if ctx.turned else _add_product
        with torch.autocast(hidden.device.type, enabled=False):
            columns = _transposed(weight, matmul_dtype)  # [D, V]
            for here, x, logits in _logits_by_chunk(hidden, columns, chunk):
                nll[here] = _nll_and_gradient_(logits, targets[here, None])
                if grad_hidden is not None:
                    torch.mm(logits, columns.T, out=grad_hidden[here])
                if want_weight:
                    grad_weight = add(grad_weight, x, logits)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:n], grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nll[:n].sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_dtype) * grad_nll.to(hidden_dtype)
        if grad_weight is not None:
            if ctx.turned:
                grad_weight = _turned(grad_weight, grad_weight.dtype).mul_(grad_nll)
            else:
                grad_weight = grad_weight * grad_nll
            grad_weight = grad_weight.to(weight_dtype)
        return grad_hidden, grad_weight, None, None


def _aligned(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows of zeros behind them, up to a multiple of ALIGNED. Zeros move no weight, and are cut off again."""
    spare = -len(hidden) % ALIGNED
    if not spare or hidden.device.type != "cpu" or _matmul_dtype(hidden) != torch.bfloat16:
        return hidden, targets
    return F.pad(hidden, (0, 0, 0, spare)), F.pad(targets, (0, spare))


def _add_product(total: Tensor | None, x: Tensor, logits: Tensor) -> Tensor:
    """The head's gradient and what some positions, [n, D], with their gradients at the logits, [n, V], add to it."""
    product = logits.T @ x  # [V, D]
    return product.to(_exact(x.dtype)) if total is None else total.add_(product)


def _add_turned(total: Tensor | None, x: Tensor, logits: Tensor) -> Tensor:
    """`_add_product` as [D, V], some columns at a time, so that what is added is never as large as the gradient."""
    D, V = x.shape[1], logits.shape[1]
    first = total is None
    if total is None:
        exact = _exact(x.dtype)
        # Rows of 49,152 numbers, 48 times 4 KiB, would all begin in the same few lines of a CPU's caches, and turning
        # it back would take 3 times as long: such rows are taken a line longer.
        room = 16 if V * exact.itemsize % 4_096 == 0 else 0
        total = x.new_empty((D, V + room), dtype=exact)[:, :V]
    x = x.T.contiguous()  # [D, n]
    for start in range(0, V, COLUMNS):
        part = slice(start, start + COLUMNS)
        product = x @ logits[:, part]
        total[:, part].copy_(product) if first else total[:, part].add_(product)
    return total


def _pays_to_turn(weight: Tensor) -> bool:
    """Whether the head's rows are laid out as columns: up to 2 times as fast on a CPU if it is wide."""
    return weight.device.type == "cpu" and len(weight) >= WIDE_HEAD


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head as [D, V], in the dtype of its products."""
    return _turned(weight, dtype) if _pays_to_turn(weight) else weight.to(dtype).T


def _turned(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose, laid out by rows: a piece at a time, which the caches hold, in a third of the time of one call."""
    turned = matrix.new_empty(matrix.T.shape, dtype=dtype)
    longer = 0 if len(matrix) >= len(turned) else 1  # the dimension that is cut into pieces
    for to, piece in zip(turned.split(1_000, 1 - longer), matrix.split(1_000, longer), strict=True):
        to.copy_(piece.T)
    return turned


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the logits. A custom function sees its arguments as they are, so autocast's choice is made here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss is computed from logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits_by_chunk(hidden: Tensor, columns: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which positions, their hidden states [n, D] and their logits [n, V], `chunk` positions at a time.

    The logits of every chunk lie in the same piece of memory: the system zeroes each new one, which takes as long as
    the product that fills it.

    Args:
        hidden: [N, D].
        columns: [D, V], the head transposed, in the dtype of the products.
    """
    N = len(hidden)
    memory = hidden.new_empty((min(chunk, N), columns.shape[1]), dtype=columns.dtype)
    for start in range(0, max(N, 1), chunk):  # without a position there is one piece of none: its gradients are zeros
        here = slice(start, min(start + chunk, N))
        x = hidden[here].to(columns.dtype)
        yield here, x, torch.mm(x, columns, out=memory[: len(x)])


def _nll_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """The nll of some positions, [n], whose logits are replaced by the gradient at them: softmax − one-hot.

    Args:
        logits: [n, V].
        targets: int64 [n, 1].
    """
    return (_a_few_rows_at_a_time_ if logits.device.type == "cpu" else _all_rows_at_once_)(logits, targets)


def _all_rows_at_once_(logits: Tensor, targets: Tensor) -> Tensor:
    """`_nll_and_gradient_` in the fewest passes over memory, which are what a GPU's time goes into."""
    log_p = logits.to(_exact(logits.dtype))  # of logits that are exact already, no copy
    torch.log_softmax(log_p, -1, out=log_p)
    nll = -log_p.gather(1, targets)  # [n, 1]
    torch.exp(log_p, out=logits)
    logits.scatter_(1, targets, torch.expm1(-nll).to(logits.dtype))  # p − 1, rounded once
    return nll[:, 0]


def _a_few_rows_at_a_time_(logits: Tensor, targets: Tensor) -> Tensor:
    """`_nll_and_gradient_` with one exponential for each logit, which are what a CPU's time goes into.

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
