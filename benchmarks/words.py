"""Parse the words of a command: an error is one line, and a mistyped word is answered with the one that is meant."""

import argparse
from collections.abc import Iterable
from typing import Any

from minift.cli import parts
from minift.errors import did_you_mean

SYNONYMS = {  # what the field calls something, and what it is called here
    **dict.fromkeys(("rmsnorm", "rms_norm", "rms-norm", "layernorm", "layer_norm"), "norm"),
    **dict.fromkeys(("mlp", "ffn", "feedforward", "feed_forward", "silu", "glu"), "swiglu"),
    **dict.fromkeys(("ce", "cross_entropy", "cross-entropy", "crossentropy", "xent", "lm_head", "logits"), "loss"),
    **dict.fromkeys(("sdpa", "attn", "flash", "flash_attention", "self_attention"), "attention"),
    **dict.fromkeys(("rotary", "rotary_embedding", "ropes"), "rope"),
    **dict.fromkeys(("embed", "embeddings", "wte", "tok_embeddings"), "embedding"),
    **dict.fromkeys(("o_proj", "out_proj", "wo"), "output"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "wqkv"), "qkv"),
    **dict.fromkeys(("block", "decoder_layer", "transformer"), "layer"),
    **dict.fromkeys(("adam", "optimizer", "optim"), "adamw"),
    **dict.fromkeys(("clip_grad_norm", "grad_norm", "clipping"), "clip"),
    **dict.fromkeys(("inference", "decode", "decoding"), "generate"),
    **dict.fromkeys(("mem", "ledger", "vram"), "memory"),
    **dict.fromkeys(("bf16", "half_bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16"), "float16"),
    **dict.fromkeys(("fp32", "single", "f32", "float"), "float32"),
    **dict.fromkeys(("gpu", "nvidia"), "cuda"),
}


def meant(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the known word that is meant: a synonym, or the most similar one; or ""."""
    names = list(known)
    synonym = SYNONYMS.get(word.lower().strip())
    return f" (did you mean {synonym}?)" if synonym in names else did_you_mean(word.lower(), names)


class Parser(parts.Parser):
    """The parser of minift's commands, which knows synonyms besides."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            if near := meant(str(value), known):
                raise argparse.ArgumentError(action, f"unknown {value!r}{near}; choose from {', '.join(known)}")
        super()._check_value(action, value)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs == "*" and not arg_strings:
            return action.default if not action.option_strings and action.default is not None else []
        return super()._get_values(action, arg_strings)
