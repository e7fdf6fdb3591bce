"""Which conversations are held out, where no file of them is given.

It is drawn from their number and a seed alone, so that an audit knows it before a run.

    minift data audit data/pairs.jsonl --seed 1
"""

import random

HELD_OUT_SHARE = 0.1  # of the conversations


def held_out_places(count: int, seed: int) -> list[int]:
    """Draw HELD_OUT_SHARE of `count` conversations by the seed, at least one; return their places in order."""
    return sorted(random.Random(seed).sample(range(count), max(1, round(count * HELD_OUT_SHARE))))
