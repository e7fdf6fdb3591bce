"""Saves on a disk that fails (`faulty_disk.c`), each in a forked process, and what they leave behind. Prints JSON.

    LD_PRELOAD=faulty_disk.so python -m tests.hostile.faulty_disk FOLDER [--careless]

A save is first done on a good disk, which counts its calls, and then again and again: at the n-th call it gets an
error, or finds the disk full from there on, or the power is lost. A loss of power also loses what was written and not
flushed: such files are cut to what the disk had. Then it is looked at which checkpoint is there, and saved once more.
`--careless` leaves out the flushing: the losses that follow show that this test would notice.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minift.checkpoint import load_model, save_model
from minift.errors import InputError, RunError
from minift.runs.place import remove_own_leftovers
from minift.runs.steps import check_step, load_step, save_step, step_folders
from minift.storage.atomic import write_file
from minift.storage.names import bundled
from minift.tokenizer.load import load_tokenizer
from tests.helpers import new_state, small_model, take_steps

FAIL, FULL, LOSE = 1, 2, 3
MODES = {"fails once": FAIL, "stays full": FULL, "loses power": LOSE}
DISK = ctypes.CDLL(None)  # with the preloaded library in it


@dataclass
class Scenario:
    """Something that is saved.

    Attributes:
        begin: make a folder in which the older one lies.
        save: the newer one over it, or beside it.
        found: which of them is there and whole: "old" or "new"; anything else is a loss.
    """

    begin: Callable[[Path], object]
    save: Callable[[Path], object]
    found: Callable[[Path], str]


def step_scenario() -> Scenario:
    """A step folder; the one before it is removed when it is there."""
    tokenizer = load_tokenizer(bundled("base"))
    old, new = new_state(), new_state()
    take_steps(old, 2)
    take_steps(new, 3)

    def everything(state: Any) -> list[Any]:
        moments = [list(values.values()) for values in state.optimizer.state_dict()["state"].values()]
        return [state.step, *state.model.state_dict().values(), *(value for some in moments for value in some)]

    def same(a: list[Any], b: list[Any]) -> bool:
        return len(a) == len(b) and all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
        )

    def found(folder: Path) -> str:
        for step in step_folders(folder):
            try:
                check_step(step)
            except InputError:
                continue
            state = new_state(seed=9)
            load_step(step, state)
            return next(
                (name for name, it in (("old", old), ("new", new)) if same(everything(state), everything(it))), "?"
            )
        return "nothing"

    return Scenario(
        lambda folder: save_step(folder, old, tokenizer, keep=1),
        lambda folder: save_step(folder, new, tokenizer, 1),
        found,
    )


def model_scenario() -> Scenario:
    """A model that takes the place of another one."""
    models = {"old": small_model(seed=1), "new": small_model(seed=2)}

    def found(folder: Path) -> str:
        # Between two renames the older one has another name; that is told to whoever looks for it.
        places = [place for name in ("final", ".final.old") if (place := folder / name).is_dir()]
        if not places:
            return "nothing"
        weights = load_model(places[0]).state_dict()
        same = [
            name for name, it in models.items() if all(torch.equal(weights[k], v) for k, v in it.state_dict().items())
        ]
        return same[0] if same else "?"

    return Scenario(
        lambda folder: save_model(folder / "final", models["old"]),
        lambda folder: save_model(folder / "final", models["new"]),
        found,
    )


def file_scenario() -> Scenario:
    """A file that takes the place of another one, as a resumed run's metrics do."""

    def save(text: str) -> Callable[[Path], object]:
        return lambda folder: write_file(folder / "metrics.jsonl", lambda partial: partial.write_text(text))

    def found(folder: Path) -> str:
        return (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else "nothing"

    return Scenario(save("old"), save("new"), found)


SCENARIOS = {"step": step_scenario, "model": model_scenario, "file": file_scenario}


def attempt(scenario: Scenario, folder: Path, call: int, mode: int, careless: bool) -> tuple[int, str, int]:
    """Save in a forked process, on a disk that fails at a call. Returns its exit code, its last words, the calls."""
    log = folder.with_suffix(".log")
    words = folder.with_suffix(".words")
    before = {file.stat().st_ino for file in folder.rglob("*") if file.is_file()}
    child = os.fork()
    if not child:
        code = 3
        try:
            if careless:
                os.fsync = lambda descriptor: None
            DISK.arm(str(folder).encode(), call, mode, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            try:
                scenario.save(folder)
                code, said = 0, ""
            except RunError as error:
                code, said = 1, str(error)
            except BaseException as error:
                said = repr(error)
            count = DISK.disarm()
            words.write_text(json.dumps([said, count]))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 137:
        lose_what_was_not_flushed(folder, log, before)
        return code, "", call
    said, count = json.loads(words.read_text())
    return code, said, count


def lose_what_was_not_flushed(folder: Path, log: Path, before: set[int]) -> None:
    """Cut every file that was made or written to to the bytes that were flushed."""
    flushed: dict[int, int] = {}
    dirty: set[int] = set()
    for line in log.read_text().splitlines():
        what, inode, size = line.split()
        if what == "S":
            flushed[int(inode)] = int(size)
            dirty.discard(int(inode))
        else:
            dirty.add(int(inode))
    for file in folder.rglob("*"):
        if file.is_file():
            inode = file.stat().st_ino
            if inode in dirty or (inode not in before and inode not in flushed):
                os.truncate(file, min(flushed.get(inode, 0), file.stat().st_size))


def campaign(name: str, scratch: Path, careless: bool) -> None:
    """Print what became of each save."""
    scenario = SCENARIOS[name]()
    first = scratch / name
    first.mkdir()
    scenario.begin(first)
    reference = scratch / f"{name}-good"
    shutil.copytree(first, reference)
    code, said, calls = attempt(scenario, reference, 0, 0, careless)
    assert (code, said, scenario.found(reference)) == (0, "", "new")
    good = sorted(str(path.relative_to(reference)) for path in reference.rglob("*"))
    for mode in MODES if not careless else ["loses power"]:
        for call in range(1, calls + 1, 4 if MODES[mode] == FULL else 1):
            folder = scratch / "now"
            shutil.copytree(first, folder)
            code, said, _ = attempt(scenario, folder, call, MODES[mode], careless)
            outcome = {"save": name, "disk": mode, "call": call, "calls": calls, "code": code, "said": said}
            try:
                outcome["found"] = scenario.found(folder)
                outcome["left"] = sorted(path.name for path in folder.glob(".*"))
                remove_own_leftovers(folder)
                scenario.save(folder)
                outcome["then"] = scenario.found(folder)
                outcome["as_good"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == good
            except Exception as error:
                outcome.setdefault("found", repr(error))
                outcome["then"] = repr(error)
            outcome["folder"] = str(folder)
            print(json.dumps(outcome), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    careless = "--careless" in sys.argv
    for scenario in ["model"] if careless else SCENARIOS:
        campaign(scenario, Path(sys.argv[1]).resolve(), careless)
