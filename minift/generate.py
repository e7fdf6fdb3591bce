"""Text from a model, token by token, with a cache of keys and values.

Legend: B prompts, T tokens, V vocabulary.

The model gives a distribution over the next id; one is chosen, appended, and the model is asked again. The prompt is
read in one pass; from then on the cache lets each new token cost one position, not the whole text.

Prompts of unequal length share a batch by padding on the *left*, so that all of them end at the same place. The padding
is its own "document": nobody attends to it, and positions count from each prompt's first real token, so a
prompt's continuation is the same alone and in company.

    minift generate --model runs/finetune/final --prompt "What is the capital of Mexico?"

Read next: `kernels/decode.py`, and `kernels/graph.py` for a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, takewhile
from typing import TypeAlias

import torch
from torch import Tensor

from minift.cache import KVCache
from minift.errors import InputError, RunError
from minift.kernels.decode import Decoder
from minift.kernels.graph import GraphDecoder
from minift.model import Llama
from minift.pack import PADDING
from minift.values import check_number

OneMore: TypeAlias = Callable[[Tensor], Tensor]  # each text's last id, [B, 1] → the logits of what follows, [B, V]
CACHE_MULTIPLE = 8  # of the places in a cache: a GPU's kernels read a mask in such pieces


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, up to and without EOS.

    Args:
        prompts: ids, BOS included; at least one id each.
        max_new_tokens: at most so many ids are added. A text also ends at the model's last position.
        temperature: 0 takes the likeliest id; 1 samples from the model's distribution; see `sample`.
        top_k, top_p: see `sample`.
        generator: the source of randomness, on the model's device; needed when temperature is not 0.

    Raises:
        InputError: for an empty prompt, a prompt as long as the model's positions, an id that is not in its vocabulary,
            or an option out of bounds.
        RunError: when the model's logits are not numbers.
    """
    _check_options(model, prompts, max_new_tokens, temperature, top_k, top_p, generator)
    steps = _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, generator)
    columns = list(zip(*steps, strict=True))  # one tuple of ids for each prompt
    return [_until_end(column, model.config.eos_token_ids) for column in columns]


def stream(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """What `generate` returns for one prompt, each id as soon as it is chosen. `TextStream` makes text of it.

    Raises:
        InputError, RunError: as `generate`, when the first id is asked for.
    """
    _check_options(model, [prompt], max_new_tokens, temperature, top_k, top_p, generator)
    for (chosen,) in _steps(model, [prompt], max_new_tokens, temperature, top_k, top_p, generator):
        if chosen in model.config.eos_token_ids:
            return
        assert chosen is not None  # one text has no neighbour to wait for
        yield chosen


@torch.inference_mode()
def _steps(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> Iterator[list[int | None]]:
    """For each new position, the id chosen for each prompt (None behind its last position), until all have ended."""
    device, dtype = model.device, model.embed_tokens.weight.dtype
    tokens, positions, document_ids = _left_pad(prompts, model.config.eos_token_ids[0], device)
    B, T = tokens.shape
    padded = bool((document_ids == PADDING).any())
    # Each text has its own end, so that a long prompt takes nothing from its neighbours.
    rooms = [min(max_new_tokens, model.config.max_position_embeddings - len(prompt)) for prompt in prompts]
    length = T + max(rooms)
    cache = KVCache(model.config, B, length + -length % CACHE_MULTIPLE, device, dtype)
    hidden = model.hidden(tokens, positions, document_ids if padded else None, cache)
    logits = hidden[:, -1] @ model.head_weight.T  # [B, V]: only the last position's are needed
    del hidden
    one_more: OneMore | None = None  # made for the second new token, if there is to be one
    finished = [False] * B
    for n in range(1, max(rooms) + 1):
        if n > 1:
            one_more = one_more or _decoder(model, cache, positions[:, -1:] + 1, document_ids[:, -1:], max(rooms) - 1)
            logits = one_more(tokens)
        tokens = sample(logits, temperature, top_k, top_p, generator)[:, None]
        ids = tokens[:, 0].tolist()
        yield [id if n <= room else None for id, room in zip(ids, rooms, strict=True)]
        ends = [id in model.config.eos_token_ids or n == room for id, room in zip(ids, rooms, strict=True)]
        finished = [before or now for before, now in zip(finished, ends, strict=True)]
        if all(finished):
            return


def _decoder(model: Llama, cache: KVCache, positions: Tensor, document_ids: Tensor, most: int) -> OneMore:
    """The fastest way to one more token of each text, whose earlier ones are in the cache.

    Args:
        positions, document_ids: int64 [B, 1], those of each text's next token.
        most: so many tokens will be asked for, or fewer.
    """
    if model.device.type == "cuda":
        return GraphDecoder(model, cache, positions, document_ids).logits
    if model.device.type == "cpu" and len(positions) == 1:
        decoder = Decoder(model, cache, most)
        return lambda tokens: decoder.logits(int(tokens))[None]
    documents = None if cache.document_ids is None else document_ids
    past = cache.length

    def plain(tokens: Tensor) -> Tensor:
        last = model.hidden(tokens, positions + (cache.length - past), documents, cache)[:, 0]
        return last @ model.head_weight.T

    return plain


def _until_end(ids: Sequence[int | None], ends: tuple[int, ...]) -> list[int]:
    """The ids before the first that ends a text."""
    text = takewhile(lambda id: id is not None and id not in ends, ids)
    return [id for id in text if id is not None]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Choose one id per row.

    Args:
        logits: [B, V].
        temperature: divides the logits; 0 takes the largest and needs no randomness.
        top_k: only the k likeliest ids may be chosen; 0 allows all.
        top_p: only the smallest set of likeliest ids that holds this much probability (Holtzman et al.,
            arXiv 1904.09751). The likeliest is always in it.

    Returns:
        int64 [B].

    Raises:
        RunError: when the logits are not numbers.
    """
    largest, likeliest = logits.max(-1)  # argmax takes a CPU three times as long in bfloat16
    if not torch.isfinite(largest).all():  # a NaN is the largest of all
        raise RunError("the model's logits are not finite numbers; its weights are damaged, or too large for its dtype")
    if temperature == 0:
        return likeliest
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # or a temperature near 0 would overflow
    probabilities = torch.softmax(logits / max(temperature, torch.finfo(torch.float32).tiny), dim=-1)
    probabilities, ids = probabilities.sort(dim=-1, descending=True)  # likeliest first
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p < 1:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities[mass_before >= top_p] = 0
    chosen = torch.multinomial(probabilities, 1, generator=generator)  # [B, 1]; it normalises by itself
    return ids.gather(1, chosen)[:, 0]


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions and document ids, int64 [B, T] each; padding in front, outside every document."""
    T = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(T, device=device)[None] - (T - lengths)[:, None]
    document_ids = torch.where(positions < 0, PADDING, 0)
    return tokens, positions.clamp(min=0), document_ids


def _check_options(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> None:
    if not prompts or not all(prompts):
        raise InputError("a prompt needs at least one token (BOS)")
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if longest >= limit:
        raise InputError(f"the prompt has {longest} tokens; this model has {limit} positions")
    for id in chain.from_iterable(prompts):
        check_number("a token id of the prompt", id, least=0, below=model.config.vocab_size)
    check_number("max_new_tokens", max_new_tokens, least=1)
    check_number("temperature", temperature, least=0)
    check_number("top_k", top_k, least=0)
    check_number("top_p", top_p, above=0)
    if top_p > 1:
        raise InputError(f"top_p is {top_p}; it is a probability, at most 1")
    if temperature > 0 and generator is None:
        raise InputError("sampling (temperature above 0) needs a generator")
