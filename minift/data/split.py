"""Which conversations are held out, where no file of them is given."""

import random

HELD_OUT_SHARE = 0.1  # of the conversations


def held_out_places(count: int, seed: int) -> list[int]:
    """Draw HELD_OUT_SHARE of `count` conversations by the seed, at least one; return their places in order."""
    return sorted(random.Random(seed).sample(range(count), max(1, round(count * HELD_OUT_SHARE))))
