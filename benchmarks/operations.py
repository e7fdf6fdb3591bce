"""The operations of a training step, one by one: their inputs, their variants, and what they cost at least.

Legend: B batch, T tokens of a row, N = B·T, D model width, H query heads, K key/value heads, C head width, F
feed-forward width, V vocabulary, P weights of the whole model.

*Variants.* `naive` is the operation as a textbook has it (`textbook.py`), in the same dtype; `used` is what minift
trains with; `compiled` is the used one through torch.compile, for what `--compile` compiles: the operations inside a
layer.

*Inputs* have the shape, dtype and layout that they have in a step, because the operations before them make them. Under
autocast the stream of hidden states and the weights are float32, and q, k, v and what attention gives are not.

*FLOPs* are those of the formula, whatever a variant does to get there; computing something twice does not count twice.
For products they are the convention of `minift/flops.py`: 2·m·k·n, and backward twice that, one product for each of the
two inputs' gradients; what goes on between them element by element is left out. An operation without products is
counted by its additions, multiplications, divisions and roots, each 1.

*Bytes* are the least traffic: each input read once and each output written once. Going backward, the inputs are those
that the gradient's formula needs and the gradient of the output, and the outputs are the inputs' gradients. What lies
between (scores, logits, the cast copies of weights) need not exist, and does not count.

Left out are the additions of the two branches to the stream, RoPE's tables (made once for all layers), and the
gradients' addition where a weight is used twice. Read next: `ops.py`.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks import textbook
from minift.attention import attend
from minift.config import PRETRAIN, LlamaConfig
from minift.loss import next_token_loss
from minift.model import DecoderLayer, Llama, apply_rope, narrowed, rope_tables
from minift.optim import make_optimizer

Call: TypeAlias = Callable[[], tuple[Tensor, ...]]
MAX_NORM = 1.0


@dataclass(frozen=True)
class Setting:
    """What all the operations share.

    Attributes:
        shape: of the model.
        batch_size, length: B rows of T tokens.
        dtype: what the products run in, by autocast.
        device: "cpu" or "cuda".
        compile: whether there are compiled variants.
    """

    shape: LlamaConfig
    batch_size: int
    length: int
    dtype: torch.dtype
    device: str
    compile: bool = False

    def autocast(self) -> torch.autocast:
        """As in a training step."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Work:
    """What something costs at least: floating-point operations, and bytes of traffic."""

    flops: float
    nbytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Operation:
    """One operation, ready to be called.

    Attributes:
        calls: how often a training step does it.
        work: by phase: "forward" and "backward", or "step" for what has no backward pass.
        variants: by name, a call that does it once. Those of a "step" work in place, each on tensors of its own.
        leaves: the inputs and weights that get a gradient.
        gradients: of the outputs, given to the backward pass.
        early: variants that compute gradients in the forward pass already, so that their two phases are not the two
            phases of `work`.
    """

    calls: int
    work: dict[str, Work]
    variants: dict[str, Call]
    leaves: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    early: tuple[str, ...] = ()

    def both(self, variant: str) -> tuple[Tensor, ...]:
        """Forward, and then backward."""
        return torch.autograd.grad(self.variants[variant](), self.leaves, self.gradients)


@dataclass(frozen=True)
class Step:
    """The operations' inputs: what a model of one layer makes on its way from random tokens to the loss."""

    setting: Setting
    generator: torch.Generator
    model: Llama
    layer: DecoderLayer
    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]
    stream: Tensor  # [B, T, D]
    normed: Tensor  # [B, T, D]
    query: Tensor  # [B, H, T, C], as are those that follow, with K heads for H
    key: Tensor
    value: Tensor
    cos: Tensor  # [B, 1, T, C]
    sin: Tensor
    turned: tuple[Tensor, Tensor]  # query and key after RoPE
    mixed: Tensor  # [B, T, H·C]


@torch.no_grad()
def make_step(setting: Setting) -> Step:
    """Random weights and tokens, always the same, and what becomes of them in the first layer."""
    generator = torch.Generator(setting.device).manual_seed(0)
    model = _model(dataclasses.replace(setting.shape, num_hidden_layers=1), setting, generator)
    shape, layer = setting.shape, model.layers[0]
    assert isinstance(layer, DecoderLayer)
    B, T, C = setting.batch_size, setting.length, shape.head_dim
    ids = torch.randint(shape.vocab_size, (B, T + 1), generator=generator, device=setting.device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions = torch.arange(T, device=setting.device).expand(B, T)
    cos, sin = rope_tables(positions, C, shape.rope_theta, shape.rope_scaling)
    with setting.autocast():
        stream = model.embed_tokens(tokens)
        normed = layer.input_layernorm(stream)
        attention = layer.self_attn
        query, key, value = (
            projection(normed).view(B, T, -1, C).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        mixed = attend(*turned, value, None).transpose(1, 2).reshape(B, T, -1)
    heads = query, key, value, cos, sin, turned, mixed
    return Step(setting, generator, model, layer, tokens, targets, stream, normed, *heads)


# The operations -------------------------------------------------------------------------------------------------------


def embedding(step: Step) -> Operation:
    """The rows of the table: no arithmetic forward, and N·D additions of gradient rows to the table's backward.

    Bytes: forward, each row that occurs is read once and N are written; backward, N gradient rows are read and the
    whole gradient of the table, V·D, is written.
    """
    embed = step.model.embed_tokens
    return _operation(
        step,
        calls=1,
        naive=lambda tokens: embed.weight[tokens],
        used=embed,
        inputs=(step.tokens,),
        weights=(embed.weight,),
        flops=(0, step.stream.numel()),
        reads=((step.tokens, embed.weight[step.tokens.unique()]), (step.tokens,)),
        compiled=False,
    )


def norm(step: Step) -> Operation:
    """RMSNorm, n = rsqrt(mean(x²) + eps) · x and y = n · w.

    FLOPs an element, N·D of them: forward 4 (square, add, two products). Backward 9: the weight's gradient Σ g·n (3, n
    being made again), and of x, s·(g·w) − x·c with c = s³/D · Σ g·w·x (6).
    """
    module = step.layer.input_layernorm
    return _operation(
        step,
        calls=2 * step.setting.shape.num_hidden_layers + 1,
        naive=lambda x: textbook.norm(x, module.weight, module.eps),
        used=module,
        inputs=(_leaf(step.stream),),
        weights=(module.weight,),
        flops=(4 * step.stream.numel(), 9 * step.stream.numel()),
    )


def rope(step: Step) -> Operation:
    """RoPE of queries and keys: 3 FLOPs an element, N·(H + K)·C of them. Backward turns the gradients the other way."""
    query, key, tables = _leaf(step.query), _leaf(step.key), (step.cos, step.sin)

    def used(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(query, cos, sin), apply_rope(key, cos, sin)

    flops = 3 * (query.numel() + key.numel())
    return _operation(
        step,
        calls=step.setting.shape.num_hidden_layers,
        naive=lambda query, key, cos, sin: (textbook.rope(query, cos, sin), textbook.rope(key, cos, sin)),
        used=used,
        inputs=(query, key, *tables),
        flops=(flops, flops),
        reads=((query, key, *tables), tables),
    )


def qkv(step: Step) -> Operation:
    """The three projections into attention: 2·N·D·(H + 2·K)·C FLOPs forward."""
    attention = step.layer.self_attn
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = tuple(module.weight for module in modules)
    products = 2 * step.tokens.numel() * sum(weight.numel() for weight in weights)

    def used(x: Tensor) -> tuple[Tensor, ...]:
        x = narrowed(x)  # as attention does
        return tuple(module(x) for module in modules)

    return _operation(
        step,
        calls=step.setting.shape.num_hidden_layers,
        naive=lambda x: tuple(x @ weight.T for weight in weights),
        used=used,
        inputs=(_leaf(step.normed),),
        weights=weights,
        flops=(products, 2 * products),
    )


def attention(step: Step) -> Operation:
    """softmax(q·kᵀ / √C) v under the causal mask: 4·C FLOPs for each of the B·H·T·(T + 1)/2 pairs that may meet."""
    B, H, T, C = step.query.shape
    products = 4 * C * B * H * T * (T + 1) // 2
    return _operation(
        step,
        calls=step.setting.shape.num_hidden_layers,
        naive=textbook.attention,
        used=lambda query, key, value: attend(query, key, value, None),
        inputs=(*map(_leaf, step.turned), _leaf(step.value)),
        flops=(products, 2 * products),
    )


def output(step: Step) -> Operation:
    """The projection out of attention: 2·N·H·C·D FLOPs forward."""
    module = step.layer.self_attn.o_proj
    products = 2 * step.tokens.numel() * module.weight.numel()
    return _operation(
        step,
        calls=step.setting.shape.num_hidden_layers,
        naive=lambda x: x @ module.weight.T,
        used=module,
        inputs=(_leaf(step.mixed),),
        weights=(module.weight,),
        flops=(products, 2 * products),
    )


def swiglu(step: Step) -> Operation:
    """The whole feed-forward network, down(silu(gate x) · up x): 6·N·D·F FLOPs forward."""
    module = step.layer.mlp
    weights = (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
    products = 2 * step.tokens.numel() * sum(weight.numel() for weight in weights)
    return _operation(
        step,
        calls=step.setting.shape.num_hidden_layers,
        naive=lambda x: textbook.swiglu(x, *weights),
        used=module,
        inputs=(_leaf(step.normed),),
        weights=weights,
        flops=(products, 2 * products),
    )


def loss(step: Step) -> Operation:
    """The head and the cross-entropy, from hidden states to one number: 2·N·D·V FLOPs forward.

    The used one computes the gradients on the way forward (`minift/loss.py`), so only the sum of its two phases can be
    held against the two phases of the formula.
    """
    head, targets = step.model.head_weight, step.targets
    products = 2 * step.tokens.numel() * head.numel()
    operation = _operation(
        step,
        calls=1,
        naive=lambda hidden: textbook.loss(hidden, head, targets),
        used=lambda hidden: next_token_loss(hidden, head, targets, PRETRAIN.loss_chunk)[0],
        inputs=(_leaf(step.normed),),
        weights=(head,),
        flops=(products, 2 * products),
        reads=((step.normed, head, targets), (step.normed, head, targets)),
        compiled=False,
    )
    return dataclasses.replace(operation, early=("used",))


def clip(step: Step) -> Operation:
    """All the gradients scaled to a joint norm of at most 1: 3·P FLOPs (square, add, scale).

    Bytes: read once and written once. (Only gradients that a cache holds need not be read twice: no gradient can be
    scaled before the last one is summed.)
    """
    parameters = list(_whole_model(step).parameters())
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
    return Operation(1, {"step": Work(3 * P, 2 * _nbytes(gradients))}, {"naive": naive, "used": used})


def adamw(step: Step) -> Operation:
    """AdamW's update of all the weights: 16·P FLOPs and 28·P bytes.

    FLOPs by the formula of `reference.adamw_step`: the mean 3, the mean square 4, their corrections 2, the root and its
    eps 2, the ratio 1, times the rate and off the weight 2, the decay 2. Bytes: weight, gradient, mean and square are
    read, all but the gradient written, in float32.
    """
    used = _whole_model(step)
    naive = copy.deepcopy(used)
    for ours, twin in zip(used.parameters(), naive.parameters(), strict=True):
        ours.grad = torch.empty_like(ours).normal_(generator=step.generator).mul_(1e-3)
        twin.grad = ours.grad
    optimizers = {"naive": make_optimizer(naive, PRETRAIN), "used": make_optimizer(used, PRETRAIN)}
    for group in optimizers["naive"].param_groups:
        group["fused"], group["foreach"] = False, False  # one parameter after the other, one small operation at a time

    def variant(name: str) -> Call:
        weights = tuple(weight for group in optimizers[name].param_groups for weight in group["params"])

        def call() -> tuple[Tensor, ...]:
            optimizers[name].step()
            return weights

        return call

    P = sum(parameter.numel() for parameter in used.parameters())
    return Operation(1, {"step": Work(16 * P, 28 * P)}, {name: variant(name) for name in optimizers})


OPERATIONS: dict[str, Callable[[Step], Operation]] = {
    "embedding": embedding,
    "norm": norm,
    "rope": rope,
    "qkv": qkv,
    "attention": attention,
    "output": output,
    "swiglu": swiglu,
    "loss": loss,
    "clip": clip,
    "adamw": adamw,
}


# What the operations above are made with ------------------------------------------------------------------------------


def _operation(
    step: Step,
    *,
    calls: int,
    naive: Callable[..., Tensor | tuple[Tensor, ...]],
    used: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    flops: tuple[float, float],
    weights: tuple[Tensor, ...] = (),
    reads: tuple[Iterable[Tensor], Iterable[Tensor]] | None = None,
    compiled: bool = True,
) -> Operation:
    """An operation with a backward pass.

    Args:
        naive, used: functions of `inputs` that know `weights` themselves.
        flops: forward, backward.
        reads: what is read, forward and backward, besides the outputs' gradients; by default inputs and weights.
        compiled: whether `--compile` compiles it.
    """

    def under_autocast(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Call:
        def call() -> tuple[Tensor, ...]:
            with step.setting.autocast():
                result = function(*inputs)
            return result if isinstance(result, tuple) else (result,)

        return call

    functions = {"naive": naive, "used": used}
    if compiled and step.setting.compile:
        functions["compiled"] = torch.compile(used, dynamic=False)
    variants = {name: under_autocast(function) for name, function in functions.items()}
    outputs = [output.detach() for output in variants["used"]()]
    gradients = tuple(torch.empty_like(output).normal_(generator=step.generator) for output in outputs)
    leaves = tuple(tensor for tensor in (*inputs, *weights) if tensor.requires_grad)
    read_forward, read_backward = reads or ((*inputs, *weights), (*inputs, *weights))
    work = {
        "forward": Work(flops[0], _nbytes(read_forward) + _nbytes(outputs)),
        "backward": Work(flops[1], _nbytes(read_backward) + _nbytes(gradients) + _nbytes(leaves)),
    }
    return Operation(calls, work, variants, leaves, gradients)


def _model(shape: LlamaConfig, setting: Setting, generator: torch.Generator) -> Llama:
    with torch.device(setting.device):
        model = Llama(shape)
    model.init_weights(generator)
    return model


def _whole_model(step: Step) -> Llama:
    return _model(step.setting.shape, step.setting, step.generator)


def _leaf(tensor: Tensor) -> Tensor:
    """The same numbers in the same layout, as an input that gets a gradient."""
    return tensor.detach().requires_grad_()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
