"""Run `minift …`, from the command or as `python -m minift …`. A signal ends it with a line, from the first moment on.

Nothing else is imported before that is arranged: the other imports take longer than a user who presses Ctrl-C at once.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command of `sys.argv`; return its exit code. A command that can save its work takes the signals over."""
    if "RANK" not in os.environ:  # torchrun, which sends SIGTERM to what is left of a run, says itself why it ends
        signal.signal(signal.SIGTERM, _end)
    try:
        from minift.cli import main

        try:
            return main()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only kill Python while it ends
    except KeyboardInterrupt:
        os.write(2, b"minift: interrupted\n")
        return 1


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"minift: interrupted\n")
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
