"""Run `minift …` as `python -m minift …`: where the script is not on the PATH."""

import sys

from minift.cli import main

if __name__ == "__main__":
    sys.exit(main())
