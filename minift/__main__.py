"""`python -m minift …` is `minift …`: the same commands where the script is not on the PATH."""

import sys

from minift.cli import main

if __name__ == "__main__":
    sys.exit(main())
