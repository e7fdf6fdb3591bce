"""Which decoder reads one more token of each text."""

from collections.abc import Callable

from torch import Tensor

from minift.cache import KVCache
from minift.kernels.decode import Decoder
from minift.kernels.graph import GraphDecoder
from minift.model import Llama


def fast_decoder(
    model: Llama, cache: KVCache, positions: Tensor, document_ids: Tensor, most: int
) -> Callable[[Tensor], Tensor] | None:
    """Return the fastest way to one more token of each text, whose earlier ones are in the cache; None: the plain one.

    Args:
        positions, document_ids: int64 [B, 1], those of each text's next token.
        most: so many tokens will be asked for, or fewer.

    Returns:
        A function from each text's last id, [B, 1], to the logits of what follows, [B, V].
    """
    if model.device.type == "cuda":
        return GraphDecoder(model, cache, positions, document_ids).logits
    if model.device.type == "cpu" and len(positions) == 1:
        decoder = Decoder(model, cache, most)
        return lambda tokens: decoder.logits(int(tokens))[None]
    return None
