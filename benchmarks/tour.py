"""Take a first look in three minutes: a step, generating, and the ladder, in small sizes and with few repeats.

How fast this machine is shows while the tour runs. Before each part it is worked out how long that will take: its usual
seconds, times how much slower the parts before it were than usual. A part that would end after BUDGET is left out, and
the tour says so, with the command that runs it.
"""

import time
from collections.abc import Callable, Sequence

from minift.storage.system import command_line

BUDGET = 180.0  # seconds
PARTS: dict[tuple[str, ...], float] = {  # with about half the seconds of computing that each takes with AVX2 alone
    ("step", "--batch-size", "4", "--repeats", "4"): 9.0,
    ("generate", "--config", "stories15m", "--new-tokens", "64", "--repeats", "3"): 10.0,
    ("ladder", "--batch-size", "8", "--repeats", "2", "--rungs", "textbook", "plain", "+ AMP", "+ packing"): 24.0,
}


def take(
    run: Callable[[Sequence[str]], object], names: Sequence[str], clock: Callable[[], float] = time.monotonic
) -> None:
    """Run each part that the time allows, and print what is left out.

    Args:
        run: runs the benchmark that words name.
        names: of all benchmarks.
        clock: returns seconds; tests replace it.
    """
    start, usual, left_out = clock(), 0.0, list[tuple[str, float]]()
    for words, seconds in PARTS.items():
        command, spent = f"python -m benchmarks {command_line(words)}", clock() - start
        expected = seconds * (spent / usual if usual else 1.0)
        if spent + expected > BUDGET:
            left_out.append((command, expected))
            continue
        print(f"\n{command}", flush=True)
        run(words)
        usual += seconds
    print(f"\nThe tour took {clock() - start:,.0f} s. Its repeats are few: a result to keep comes from each alone.")
    for command, expected in left_out:
        print(f"Left out, because this machine would take about {expected:,.0f} s for it: {command}")
    toured = {words[0] for words in PARTS}
    others = ", ".join(name for name in names if name not in toured)
    print(f"Not part of the tour: {others} (python -m benchmarks --help)")
