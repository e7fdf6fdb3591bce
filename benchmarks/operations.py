"""Define the operations of a training step, one by one: their variants and their minimal costs.

Legend: B batch, T tokens of a row, N = B·T, D model width, H query heads, K key/value heads, C head width, F
feed-forward width, V vocabulary, P weights of the whole model.

*FLOPs* are those of the formula, not those that a variant executes: a recomputation does not count. Matrix products
follow the convention of `minift/costs/flops.py`: 2·m·k·n forward, and twice that backward, one product for the gradient
of each of the two inputs; elementwise work between products is not counted. An operation without products is counted by
its additions, multiplications, divisions and roots, each 1.

*Bytes* are the least traffic: each input read once and each output written once. In the backward pass the inputs are
the gradient of the output and what the gradient's formula needs, and the outputs are the inputs' gradients.
Intermediate results (scores, logits, cast copies of weights) need not be in memory, and do not count.

The operations inside a layer are those of its modules. `layer` is all of them at once, including the residual
additions, which the others leave out. RoPE's tables (made once for all layers) and the addition of gradients where a
weight is used twice are not counted.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.operation import Call, Function, Operation, Step, Work, leaf, nbytes_of, two_passes, whole_model
from minift.config import PRETRAIN
from minift.costs.flops import forward_flops_per_token
from minift.kernels.adamw import make_optimizer
from minift.model import DecoderLayer

MAX_NORM = 1.0


def embedding(step: Step) -> Operation:
    """Look up rows of the table: no FLOPs forward; backward N·D additions of gradient rows to the table's gradient.

    Bytes: forward, each row that occurs is read once and N are written; backward, N gradient rows are read and the
    whole gradient of the table, V·D, is written.
    """
    embed = step.model.embed_tokens
    return two_passes(
        step,
        calls=1,
        naive=lambda tokens: embed.weight[tokens],
        used=embed,
        inputs=(step.tokens,),
        weights=(embed.weight,),
        flops=(0, step.stream.numel()),
        reads=((step.tokens, embed.weight[step.tokens.unique()]), (step.tokens,)),
    )


def norm(step: Step) -> Operation:
    """Normalise by RMSNorm: n = rsqrt(mean(x²) + eps) · x and y = n · w.

    FLOPs for each of N·D elements: forward 4 (square, add, two products). Backward 9: 3 for the weight's gradient
    Σ g·n, with n recomputed, and 6 for that of x, s·(g·w) − x·c, where s = rsqrt(…) and c = s³/D · Σ g·w·x.
    """
    module = step.model.norm
    return two_passes(
        step,
        calls=2 * step.setting.shape.num_hidden_layers + 1,
        inside=2 * step.setting.shape.num_hidden_layers,
        naive=lambda x: textbook.norm(x, module.weight, module.eps),
        used=step.objective.model.norm,
        compiled=module,
        inputs=(leaf(step.stream),),
        weights=(module.weight,),
        flops=(4 * step.stream.numel(), 9 * step.stream.numel()),
    )


def rope(step: Step) -> Operation:
    """Rotate queries and keys: 3 FLOPs for each of N·(H + K)·C elements. Backward rotates by the opposite angle."""
    query, key, tables = leaf(step.query), leaf(step.key), (step.shared.cos, step.shared.sin)

    def rotate_by(layer: DecoderLayer) -> Function:
        rope = layer.self_attn.rope
        return lambda query, key, cos, sin: (rope(query, cos, sin), rope(key, cos, sin))

    flops = 3 * (query.numel() + key.numel())
    return two_passes(
        step,
        calls=step.setting.shape.num_hidden_layers,
        inside=step.setting.shape.num_hidden_layers,
        naive=lambda query, key, cos, sin: (textbook.rope(query, cos, sin), textbook.rope(key, cos, sin)),
        used=rotate_by(step.trained),
        compiled=rotate_by(step.layer),
        inputs=(query, key, *tables),
        flops=(flops, flops),
        reads=((query, key, *tables), tables),
    )


def qkv(step: Step) -> Operation:
    """Project to queries, keys and values: 2·N·D·(H + 2·K)·C FLOPs forward."""
    attention = step.layer.self_attn
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = tuple(module.weight for module in modules)
    products = 2 * step.tokens.numel() * sum(weight.numel() for weight in weights)

    def used(x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(step.setting.dtype)  # cast once for all three, as a layer's norm does
        return tuple(module(x) for module in modules)

    return two_passes(
        step,
        calls=step.setting.shape.num_hidden_layers,
        inside=step.setting.shape.num_hidden_layers,
        naive=lambda x: tuple(x @ weight.T for weight in weights),
        used=used,
        inputs=(leaf(step.normed),),
        weights=weights,
        flops=(products, 2 * products),
    )


def attention(step: Step) -> Operation:
    """Attend, softmax(q·kᵀ / √C) v under the causal mask: 4·C FLOPs for each of B·H·T·(T + 1)/2 pairs."""
    B, H, T, C = step.query.shape
    products = 4 * C * B * H * T * (T + 1) // 2
    return two_passes(
        step,
        calls=step.setting.shape.num_hidden_layers,
        inside=step.setting.shape.num_hidden_layers,
        naive=textbook.attention,
        used=lambda query, key, value: step.trained.self_attn.attend(query, key, value, None),
        inputs=(*map(leaf, step.rotated), leaf(step.value)),
        flops=(products, 2 * products),
    )


def output(step: Step) -> Operation:
    """Project the result of attention: 2·N·H·C·D FLOPs forward."""
    module = step.layer.self_attn.o_proj
    products = 2 * step.tokens.numel() * module.weight.numel()
    return two_passes(
        step,
        calls=step.setting.shape.num_hidden_layers,
        inside=step.setting.shape.num_hidden_layers,
        naive=lambda x: x @ module.weight.T,
        used=module,
        inputs=(leaf(step.mixed),),
        weights=(module.weight,),
        flops=(products, 2 * products),
    )


def swiglu(step: Step) -> Operation:
    """Apply the feed-forward network, down(silu(gate x) · up x): 6·N·D·F FLOPs forward."""
    module = step.layer.mlp
    weights = (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
    products = 2 * step.tokens.numel() * sum(weight.numel() for weight in weights)
    return two_passes(
        step,
        calls=step.setting.shape.num_hidden_layers,
        inside=step.setting.shape.num_hidden_layers,
        naive=lambda x: textbook.swiglu(x, *weights),
        used=module,
        inputs=(leaf(step.normed),),
        weights=weights,
        flops=(products, 2 * products),
    )


def layer(step: Step) -> Operation:
    """Apply a decoder layer. FLOPs: those of its products (`qkv`, `attention`, `output`, `swiglu`).

    Bytes: the hidden states, the weights and RoPE's tables are read; the forward pass writes the hidden states, and the
    backward pass the gradients of hidden states and weights. `used` is `minift/kernels/layer.py` where training
    installs it; `compiled` is the plain layer.
    """
    module, tables, setting = step.layer, (step.shared.cos, step.shared.sin), step.setting
    head = 2 * step.model.head_weight.numel()
    products = step.tokens.numel() * (forward_flops_per_token(step.model.config, setting.length) - head)

    with setting.autocast():
        shared = step.objective.model.prepare(step.tokens, None, None, None)  # once for all layers

    stream, weights = leaf(step.stream), tuple(module.parameters())
    return two_passes(
        step,
        calls=setting.shape.num_hidden_layers,
        naive=lambda x: textbook.layer(module, x, *tables),
        used=lambda x: step.trained(x, shared),
        compiled=lambda x: module(x, step.shared),
        inputs=(stream,),
        weights=weights,
        flops=(products, 2 * products),
        reads=((stream, *weights, *tables), (stream, *weights, *tables)),
    )


def loss(step: Step) -> Operation:
    """Compute the head and the summed cross-entropy of hidden states: 2·N·D·V FLOPs forward.

    `used` computes the gradients already in the forward pass (`minift/kernels/cross_entropy.py`), so only the sum of
    its two phases can be compared with the formula.
    """
    head, targets = step.model.head_weight, step.targets
    products = 2 * step.tokens.numel() * head.numel()
    operation = two_passes(
        step,
        calls=1,
        naive=lambda hidden: textbook.loss(hidden, head, targets),
        used=lambda hidden: step.objective.loss(hidden, head, targets),
        inputs=(leaf(step.normed),),
        weights=(head,),
        flops=(products, 2 * products),
        reads=((step.normed, head, targets), (step.normed, head, targets)),
    )
    return dataclasses.replace(operation, early=("used",))


def clip(step: Step) -> Operation:
    """Scale all gradients to a global norm of at most 1: 3·P FLOPs (square, add, scale).

    Bytes: each gradient is read once and written once. In practice it is read twice unless a cache holds it, because no
    gradient can be scaled before the norm of all is known.
    """
    parameters = list(whole_model(step).parameters())
    gradients = [torch.empty_like(parameter).normal_(generator=step.generator) for parameter in parameters]
    twins = [gradient.clone() for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient

    def naive() -> tuple[Tensor, ...]:
        textbook.clip(twins, MAX_NORM)
        return tuple(twins)

    def used() -> tuple[Tensor, ...]:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        return tuple(gradients)

    P = sum(gradient.numel() for gradient in gradients)
    return Operation(1, 0, {"step": Work(3 * P, 2 * nbytes_of(gradients))}, {"naive": naive, "used": used})


def adamw(step: Step) -> Operation:
    """Update all weights by AdamW: 16·P FLOPs and 28·P bytes.

    FLOPs by the formula of `reference.adamw_step`: 3 for the first moment, 4 for the second, 2 for their bias
    corrections, 2 for the root and eps, 1 for the ratio, 2 for the learning rate and the subtraction, 2 for weight
    decay. Bytes: weight, gradient and both moments are read, all but the gradient written, in float32.
    """
    used = whole_model(step)
    naive = copy.deepcopy(used)
    for ours, twin in zip(used.parameters(), naive.parameters(), strict=True):
        ours.grad = torch.empty_like(ours).normal_(generator=step.generator).mul_(1e-3)
        twin.grad = ours.grad
    optimizers = {"naive": textbook.adamw(naive, PRETRAIN), "used": make_optimizer(used, PRETRAIN)}

    def variant(name: str) -> Call:
        weights = tuple(weight for group in optimizers[name].param_groups for weight in group["params"])

        def call() -> tuple[Tensor, ...]:
            optimizers[name].step()
            return weights

        return call

    P = sum(parameter.numel() for parameter in used.parameters())
    return Operation(1, 0, {"step": Work(16 * P, 28 * P)}, {name: variant(name) for name in optimizers})


OPERATIONS: dict[str, Callable[[Step], Operation]] = {
    "embedding": embedding,
    "norm": norm,
    "rope": rope,
    "qkv": qkv,
    "attention": attention,
    "output": output,
    "swiglu": swiglu,
    "layer": layer,
    "loss": loss,
    "clip": clip,
    "adamw": adamw,
}
