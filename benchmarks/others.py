"""Make a model of LitGPT or torchtune with minift's weights, and its loss: sides of `peers` for who has these packages.

Neither is needed for anything else, and each asks for versions of other packages that do not fit here: an environment
of its own is best. Both are given what `transformers` is given: float32 weights, autocast, AdamW's fused kernel.

* *litgpt*: its `GPT` and `chunked_cross_entropy`, as in its `pretrain` and `finetune_full`; compiled as a whole;
* *torchtune*: its `llama2` and `CEWithChunkedOutputLoss`, as in its recipe `full_finetune_single_device`; its layers
  are compiled, and its loss. It has no Llama whose head is the embedding without the RoPE of Llama 3.2.

    pip install litgpt && python -m benchmarks peers --sides "minift, compiled" "litgpt, compiled"
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor

from minift.errors import InputError
from minift.model import Llama
from minift.pack import IGNORE

LITGPT_LAYER = {  # of LitGPT's layers: each tensor, and those of minift's that follow each other in it
    "norm_1": ("input_layernorm",),
    "norm_2": ("post_attention_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
LossOf: TypeAlias = Callable[[Tensor], Tensor]  # int64 [B, T] → the mean loss of each token after the first


def litgpt(model: Llama, compiled: bool) -> tuple[torch.nn.Module, LossOf]:
    """Return LitGPT's model with the weights of a model, on its device, and its loss.

    Raises:
        InputError: when the package is not installed, or has no such model.
    """
    package, cross_entropy = _package("litgpt"), _package("litgpt.utils").chunked_cross_entropy
    shape = model.config
    if shape.rope_scaling is not None:
        raise InputError("litgpt: RoPE with a scaling is not compared; give another --config, or other --sides")
    with model.device:
        theirs = package.GPT(
            package.Config(
                block_size=shape.max_position_embeddings,
                vocab_size=shape.vocab_size,
                padded_vocab_size=shape.vocab_size,
                n_layer=shape.num_hidden_layers,
                n_head=shape.num_attention_heads,
                n_query_groups=shape.num_key_value_heads,
                n_embd=shape.hidden_size,
                head_size=shape.head_dim,
                intermediate_size=shape.intermediate_size,
                rotary_percentage=1.0,
                rope_base=int(shape.rope_theta),
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                norm_eps=shape.rms_norm_eps,
                mlp_class_name="LLaMAMLP",
            )
        )
    given = model.state_dict()
    weights = {"transformer.wte.weight": given["embed_tokens.weight"], "lm_head.weight": model.head_weight}
    weights["transformer.ln_f.weight"] = given["norm.weight"]
    for i in range(shape.num_hidden_layers):
        for name, parts in LITGPT_LAYER.items():
            matrices = [given[f"layers.{i}.{part}.weight"] for part in parts]
            weights[f"transformer.h.{i}.{name}.weight"] = torch.cat(matrices)
    theirs.load_state_dict(weights)
    if shape.tie_word_embeddings:
        theirs.lm_head.weight = theirs.transformer.wte.weight
    forward = torch.compile(theirs) if compiled else theirs
    return theirs, lambda tokens: cross_entropy(forward(tokens)[:, :-1], tokens[:, 1:])


def torchtune(model: Llama, compiled: bool) -> tuple[torch.nn.Module, LossOf]:
    """Return torchtune's model with the weights of a model, on its device, and its loss. Raises InputError as above."""
    make, convert = _package("torchtune.models.llama2").llama2, _package("torchtune.models.convert_weights").hf_to_tune
    shape = model.config
    if shape.rope_scaling is not None or shape.tie_word_embeddings:
        raise InputError(
            "torchtune: a tied head or scaled RoPE is not compared; give another --config, or other --sides"
        )
    sizes = {"num_heads": shape.num_attention_heads, "num_kv_heads": shape.num_key_value_heads}
    with model.device:
        theirs = make(
            vocab_size=shape.vocab_size,
            num_layers=shape.num_hidden_layers,
            embed_dim=shape.hidden_size,
            max_seq_len=shape.max_position_embeddings,
            intermediate_dim=shape.intermediate_size,
            norm_eps=shape.rms_norm_eps,
            rope_base=shape.rope_theta,
            **sizes,
        )
    names = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in model.state_dict().items()}
    theirs.load_state_dict(convert(names, **sizes, dim=shape.hidden_size, head_dim=shape.head_dim))
    cross_entropy = _package("torchtune.modules.loss").CEWithChunkedOutputLoss(ignore_index=IGNORE)
    theirs.set_num_output_chunks(cross_entropy.num_output_chunks)
    if compiled:
        training = _package("torchtune.training")
        training.compile_model(theirs, verbose=False)
        training.compile_loss(cross_entropy, verbose=False)

    def loss_of(tokens: Tensor) -> Tensor:
        none = torch.full_like(tokens[:, :1], IGNORE)
        loss: Tensor = cross_entropy(theirs(tokens), torch.cat((tokens[:, 1:], none), 1))
        return loss

    return theirs, loss_of


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"--sides {package}: {error}; pip install {package}, or give other --sides") from None
