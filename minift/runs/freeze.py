"""Freeze parameters by name: they stay as they are, bit for bit, while the others are trained.

A frozen parameter gets no gradient, no moments and no weight decay, and is no part of the gradient's norm. It is still
saved with the model, and in the step folders.

    minift finetune --freeze 'embed_tokens*' 'layers.0.*' '*norm*'
"""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from minift.errors import InputError, did_you_mean
from minift.model import Llama

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def freeze(model: Llama, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of some patterns. Where embedding and head are tied, say so.

    Raises:
        InputError: as `frozen_names`.
    """
    parameters = dict(model.named_parameters())
    frozen = frozen_names(parameters, patterns)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if EMBEDDING in frozen and model.config.tie_word_embeddings:
        print("note: the embedding and the head are one tensor (tied): --freeze leaves both as they are")


def frozen_names(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Return the names of parameters that match one of some patterns, in which `*` stands for any characters.

    Hugging Face's names, which begin with `model.`, match, too. A tied head is the embedding.

    Raises:
        InputError: for a pattern that matches nothing, or when nothing would be left to train.
    """
    known = dict(zip(names, names, strict=True))
    known.setdefault(HEAD, EMBEDDING)
    frozen: set[str] = set()
    for pattern in patterns:
        found = {known[name] for name in known if fnmatchcase(name, pattern.removeprefix("model."))}
        if not found:
            near, like = did_you_mean(pattern, _possible_patterns(known)), ", ".join([*names][:3])
            raise InputError(f"--freeze {pattern!r} matches no parameter{near}; their names are like {like}")
        frozen |= found
    if len(frozen) == len(names):
        raise InputError(f"--freeze {' '.join(patterns)}: freezes every parameter; nothing is left to train")
    return frozen


def trained_in_words(model: Llama) -> str:
    """Return how many of a model's parameters are trained, in words."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return "all of them trained" if all(trained) else f"{count:,} of them trained"


def _possible_patterns(names: Collection[str]) -> list[str]:
    """Return the names themselves, and patterns for the modules on their way: `layers.0.*`, `*q_proj*`."""
    paths = [name.split(".") for name in names]
    patterns = {".".join(path[:end]) + ".*" for path in paths for end in range(1, len(path))}
    return [*names, *sorted(patterns | {f"*{path[-2]}*" for path in paths})]
