"""Fork fresh processes for both sides of a comparison from one parent that has imported torch, and nothing of minift.

A process has a speed of its own: where its code and its heap lie, the seed of its hashes and the pages that it was
given make identical code up to a few percent faster or slower for as long as it lives. So `compare --commits` restarts
its processes many times. Importing torch takes seconds, a fork milliseconds:

* the parent imports torch, once, and waits on a socket. Each connection is a child of its own;
* a child puts its side's folder first on the path and only then imports minift: what is compared is never shared;
* what the parent had drawn (hash seed, addresses of libraries) is the same on both sides, and cancels in the ratio;
* what is left differs from child to child. Each also shifts its heap by a number of bytes of its own, so that a lucky
  layout of one side is an accident of one process, and not of them all (Curtsinger and Berger, "Stabilizer", 2013).

When the parent's standard input ends, all children are killed: nothing outlives the command, however it ended. This
file is run by its path, `python -P nursery.py SOCKET`, and imports nothing of this project. Needs `os.fork`.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import random
import select
import signal
import socket
import sys
import traceback

# What torch and minift import late, if it is installed: a third of a second of each child's start.
LATE = ("numpy", "sentencepiece", "sympy", "statistics", "torch.nn.attention.flex_attention")
PAGES = 256  # of 4 KiB: a child's heap is shifted by fewer than these


def main(place: str) -> None:
    """Serve connections on the socket `place` by a child each, until standard input ends."""
    for name in ("torch", *LATE):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the command ends its processes itself
    gc.collect()
    gc.freeze()
    children = set[int]()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                break
            connection, _ = listener.accept()
            child = os.fork()
            if child == 0:
                listener.close()
                _live(connection)
            connection.close()
            children = {child, *(pid for pid in children if os.waitpid(pid, os.WNOHANG) == (0, 0))}
    for pid in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _live(connection: socket.socket) -> None:
    """Be a child: answer the lines of a connection until it ends. The first line names the folder of its side."""
    try:
        with connection.makefile("rw", encoding="utf-8") as lines:
            first = json.loads(lines.readline())
            shifted = shift(first["seed"])
            sys.pycache_prefix = first["cache"]
            sys.path.insert(0, first["root"])
            from benchmarks.workloads import serve

            serve(first, lines)
            del shifted
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def shift(seed: int) -> list[object]:
    """Shift the heap and the maps of this process by as much as the seed says, while the result is held."""
    draw = random.Random(seed)
    blocks = [bytes(16 * draw.randrange(1, 32)) for _ in range(draw.randrange(64))]
    return [*blocks, mmap.mmap(-1, mmap.PAGESIZE * draw.randrange(1, PAGES))]


if __name__ == "__main__":
    main(sys.argv[1])
