"""`python -m benchmarks NAME [options]`: one measurement each. Read next: `README.md`."""

import argparse
import sys

from benchmarks import data, load, memory, ops, packing, peers, profile, step, stream
from minift.errors import InputError

BENCHMARKS = {
    "load": load,
    "data": data,
    "stream": stream,
    "packing": packing,
    "ops": ops,
    "peers": peers,
    "step": step,
    "profile": profile,
    "memory": memory,
}


def main() -> int:
    """Run one benchmark. Returns the exit code: 2 for wrong input, in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure minift.")
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in BENCHMARKS.items():
        text = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(names.add_parser(name, help=text, description=text))
    options = parser.parse_args()
    try:
        BENCHMARKS[options.name].run(options)
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
