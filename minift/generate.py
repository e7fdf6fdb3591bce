"""Text from a model, token by token, with a cache of keys and values.

Legend: B prompts, T tokens, V vocabulary.

The model gives a distribution over the next id. One id is chosen and appended, and the model is asked again. The prompt
is read in one pass. After it the cache holds the keys and values of the text so far, so each new token costs one
position, not the whole text.

Prompts of unequal length share a batch by padding on the *left*: all of them end at the same place. The padding is a
"document" of its own, to which no token of a prompt attends, and positions count from each prompt's first real token.
So a prompt's continuation is the same alone and in a batch.

    minift generate --model runs/finetune/final --prompt "What is the capital of Mexico?"

Read next: `lora.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, takewhile

import torch
from torch import Tensor

from minift.cache import KVCache
from minift.errors import InputError, RunError
from minift.model import Llama
from minift.pack import PADDING
from minift.values import check_number


@dataclass(frozen=True)
class Sampling:
    """A way to choose one id from a distribution. The default is greedy: the id with the largest logit.

    Attributes:
        temperature: divides the logits. 0 is greedy, 1 samples from the model's own distribution.
        top_k: only the k likeliest ids may be chosen; 0 allows all.
        top_p: only the smallest set of likeliest ids that holds this much probability (Holtzman et al.,
            arXiv 1904.09751). The likeliest id is always in it.
        seed: of the random numbers. The same seed gives the same text.

    Raises:
        InputError: for a value out of bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0)
        check_number("top_k", self.top_k, least=0)
        check_number("top_p", self.top_p, above=0)
        if self.top_p > 1:
            raise InputError(f"top_p is {self.top_p}; it is a probability, so it must be at most 1")
        check_number("seed", self.seed, least=0)


GREEDY = Sampling()


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    plain: bool = False,
) -> list[list[int]]:
    """Return the continuation of each prompt, up to and without a stop token.

    Args:
        prompts: ids, BOS included; at least one id each.
        max_new_tokens: the largest number of ids to add. A text also ends at the model's last position.
        plain: decode with `model.hidden` alone, without the faster decoders of `kernels/`.

    Raises:
        InputError: for an empty prompt, a prompt as long as the model's positions, an id that is not in its vocabulary,
            or `max_new_tokens` below 1.
        RunError: when the model's logits are not finite numbers.
    """
    limits = _limits(model, prompts, max_new_tokens)
    columns = zip(*_steps(model, prompts, limits, sampling, plain), strict=True)  # the ids of each prompt
    ends = model.config.eos_token_ids
    texts = [ids[:limit] for ids, limit in zip(columns, limits, strict=True)]
    return [list(takewhile(lambda id: id not in ends, text)) for text in texts]


def stream(
    model: Llama, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, plain: bool = False
) -> Iterator[int]:
    """Yield the ids that `generate` returns for one prompt, each as soon as it is chosen. `TextStream` decodes them.

    Raises:
        InputError, RunError: as `generate`, when the first id is asked for.
    """
    limits = _limits(model, [prompt], max_new_tokens)
    for (id,) in _steps(model, [prompt], limits, sampling, plain):
        if id in model.config.eos_token_ids:
            return
        yield id


@torch.inference_mode()
def _steps(
    model: Llama, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: Sampling, plain: bool
) -> Iterator[list[int]]:
    """Yield the id chosen for each prompt at each new position, until all texts have ended.

    A text that has ended stays in the batch; the ids chosen for it from then on mean nothing. `limits`: the number of
    new ids at which each text ends.
    """
    ends = model.config.eos_token_ids
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    tokens, positions, document_ids = _left_pad(prompts, ends[0], model.device)  # [B, T] each
    B, T = tokens.shape
    padded = any(len(prompt) < T for prompt in prompts)
    length = T + max(limits)
    length += -length % 8  # a multiple of 8: the attention kernels of a GPU want masks of aligned length
    cache = KVCache(model.config, B, length, model.device, model.embed_tokens.weight.dtype)
    logits = _next_logits(model, tokens, positions, document_ids if padded else None, cache)
    positions, document_ids = positions[:, -1:] + 1, document_ids[:, -1:]  # [B, 1], those of the next token
    fast, ended = None, [False] * B
    for n in count(1):
        chosen = sample(logits, sampling, generator)  # [B]
        ids = chosen.tolist()
        yield ids
        ended = [was or id in ends or n == limit for was, id, limit in zip(ended, ids, limits, strict=True)]
        if all(ended):
            return
        tokens = chosen[:, None]  # [B, 1]
        if n == 1 and not plain:
            from minift.kernels import fast_decoder

            fast = fast_decoder(model, cache, positions, document_ids, max(limits) - 1)
        if fast is not None:
            logits = fast(tokens)
        else:
            logits = _next_logits(model, tokens, positions, document_ids if padded else None, cache)
            positions = positions + 1


def _next_logits(
    model: Llama, tokens: Tensor, positions: Tensor, document_ids: Tensor | None, cache: KVCache
) -> Tensor:
    """Read more tokens of each text, [B, T]; return the logits of the token that follows them, [B, V]."""
    hidden = model.hidden(tokens, positions, document_ids, cache)  # [B, T, D]
    return hidden[:, -1] @ model.head_weight.T


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose one id for each row of logits, [B, V] → int64 [B].

    Raises:
        RunError: when the logits are not finite numbers.
    """
    largest, likeliest = logits.max(-1)  # argmax takes a CPU three times as long in bfloat16
    if not torch.isfinite(largest).all():  # max returns a NaN where there is one
        raise RunError("the model's logits are not finite numbers; its weights are damaged, or too large for its dtype")
    if sampling.temperature == 0:
        return likeliest
    logits = logits.float() - largest[:, None].float()  # or a temperature near 0 would overflow
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities, ids = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)  # likeliest first
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities[mass_before >= sampling.top_p] = 0
    chosen = torch.multinomial(probabilities, 1, generator=generator)  # [B, 1]; it normalises each row itself
    return ids.gather(1, chosen)[:, 0]


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, positions and document ids, int64 [B, T] each. Padding comes first, as a document of its own."""
    T = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(T, device=device)[None] - (T - lengths)[:, None]
    document_ids = torch.where(positions < 0, PADDING, 0)
    return tokens, positions.clamp(min=0), document_ids


def _limits(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Return how many new ids each text may get; each has its own limit. Raises InputError, as `generate`."""
    if not prompts or not all(prompts):
        raise InputError("a prompt is empty; it needs at least one token (BOS)")
    longest, positions = max(map(len, prompts)), model.config.max_position_embeddings
    if longest >= positions:
        raise InputError(f"the prompt has {longest} tokens; it must be shorter than the model's {positions} positions")
    for id in chain.from_iterable(prompts):
        check_number("a token id of the prompt", id, least=0, below=model.config.vocab_size)
    check_number("max_new_tokens", max_new_tokens, least=1)
    return [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]
