"""Run one benchmark, `python -m benchmarks NAME [options]`; without a name, run a quick tour."""

import argparse
import io
import sys

from benchmarks import (
    alike,
    arguments,
    attention,
    audit,
    compare,
    data,
    defaults,
    generate,
    ladder,
    lesson,
    load,
    lora,
    loss,
    memory,
    ops,
    packing,
    peers,
    profile,
    scale,
    soak,
    step,
    stream,
)
from minift.errors import InputError
from minift.storage.system import command_line

BENCHMARKS = {
    "load": load,
    "data": data,
    "stream": stream,
    "packing": packing,
    "audit": audit,
    "ops": ops,
    "attention": attention,
    "loss": loss,
    "ladder": ladder,
    "peers": peers,
    "step": step,
    "profile": profile,
    "memory": memory,
    "generate": generate,
    "lora": lora,
    "defaults": defaults,
    "scale": scale,
    "soak": soak,
    "lesson": lesson,
    "compare": compare,
    "alike": alike,
}

# A first look in under three minutes on two cores. Few repeats: a result to keep comes from each benchmark alone.
TOUR = (
    ("step",),
    ("ladder", "--repeats", "3", "--rungs", "textbook", "plain", "+ AMP", "+ packing"),
    ("generate", "--config", "stories15m", "--repeats", "3"),
)


def main() -> int:
    """Run one benchmark, or the tour. Return the exit code: 2 for wrong input, which is reported in one line.

    `compare` has its own: 1 when something is slower.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure minift.")
    names = parser.add_subparsers(dest="name", metavar="NAME")
    for name, module in BENCHMARKS.items():
        text = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(names.add_parser(name, help=text, description=text))
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # a character that the terminal does not have is escaped
    options = parser.parse_args()
    code = 0
    try:
        for words in [sys.argv[1:]] if options.name else TOUR:
            if not options.name:
                print(f"\npython -m benchmarks {command_line(words)}", flush=True)
            options_of = parser.parse_args(words)
            arguments.check_files(options_of)
            code = max(code, BENCHMARKS[options_of.name].run(options_of) or 0)
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
