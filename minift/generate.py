"""Text from a model, token by token, with a cache of keys and values.

Legend: B prompts, T tokens, V vocabulary.

The model gives a distribution over the next id; one is chosen, appended, and the model is asked again. The prompt is
read in one pass; from then on the cache lets each new token cost one position, not the whole text.

Prompts of unequal length share a batch by padding on the *left*, so that all of them end at the same place. The padding
is its own "document": nobody attends to it, and positions count from each prompt's first real token, so a
prompt's continuation is the same alone and in company.

    minift generate --model runs/finetune/final --prompt "What is the capital of Mexico?"

Read next: `evaluate.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minift.config import check_number
from minift.errors import InputError
from minift.model import KVCache, Llama
from minift.pack import PADDING


@torch.inference_mode()
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
        InputError: for an empty prompt, a prompt as long as the model's positions, or an option out of bounds.
    """
    _check_options(model, prompts, max_new_tokens, temperature, top_k, top_p, generator)
    device, dtype, eos = model.device, model.embed_tokens.weight.dtype, model.config.eos_token_id
    tokens, positions, document_ids = _left_pad(prompts, eos, device)
    B, T = tokens.shape
    # Each text has its own end, so that a long prompt takes nothing from its neighbours.
    rooms = [min(max_new_tokens, model.config.max_position_embeddings - len(prompt)) for prompt in prompts]
    cache = KVCache(model.config, B, T + max(rooms), device, dtype)
    ends = torch.tensor(rooms, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    padded = bool((document_ids == PADDING).any())
    columns = []
    for n in range(1, max(rooms) + 1):
        hidden = model.hidden(tokens, positions, document_ids if padded else None, cache)
        logits = hidden[:, -1] @ model.head_weight.T  # [B, V]: only the last position's are needed
        chosen = sample(logits, temperature, top_k, top_p, generator)  # [B]
        columns.append(chosen)
        finished |= (chosen == eos) | (ends == n)
        if finished.all():
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        document_ids = document_ids[:, -1:]
    rows = [row[:room] for row, room in zip(torch.stack(columns, dim=1).tolist(), rooms, strict=True)]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


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
    """
    if temperature == 0:
        return logits.argmax(-1)
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
    check_number("max_new_tokens", max_new_tokens, least=1)
    check_number("temperature", temperature, least=0)
    check_number("top_k", top_k, least=0)
    check_number("top_p", top_p, above=0)
    if top_p > 1:
        raise InputError(f"top_p is {top_p}; it is a probability, at most 1")
    if temperature > 0 and generator is None:
        raise InputError("sampling (temperature above 0) needs a generator")
