"""The promise that an unlucky machine, or a hasty user, costs nothing but the work since the last save.

Two runs in one folder, too little memory, a clock that jumps: each ends with one line that says why, or continues.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.std

from minift import train
from minift.cli import main
from minift.config import LlamaConfig
from minift.distributed.world import World
from minift.errors import InputError, is_out_of_memory, out_of_memory
from minift.formats.llama2c import HEADER_BYTES, order
from minift.runs.folder import own_folder
from minift.storage.lock import LOCK, locked
from tests.helpers import ROOT, completed, write_jsonl

ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
MINIFT = [sys.executable, "-m", "minift"]


@pytest.fixture
def words(tmp_path: Path, small_checkpoint: Path) -> list[str]:
    """Return the words of a finetuning, without its length and its `--out`."""
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    command = ["finetune", "--model", small_checkpoint, "--data", data, "--batch-size", 4]
    return [str(word) for word in (*command, "--device", "cpu", "--dtype", "float32", "--eval-every", 0)]


def last_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").open(encoding="utf-8")]


# Two runs on one folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def running(words: list[str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start a run that would take very long; yield its process and its folder during its first steps."""
    out = tmp_path / "run"
    command = [*MINIFT, *words, "--steps", "1000000", "--save-every", "5", "--keep", "2", "--out", str(out)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    try:
        while not list(out.glob("step_*")):
            assert process.poll() is None
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.01)
        yield process, out
    finally:
        process.kill()
        process.wait(60)


def test_a_run_in_use_is_not_continued_and_not_begun_anew(
    running: tuple[subprocess.Popen[bytes], Path], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    process, out = running
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    busy = f"minift: error: {out}: another run is writing it; wait for its end, or choose another --out"
    assert last_line(capfd.readouterr().err) == busy
    assert main([*words, "--steps", "3", "--out", str(out)]) == 2
    assert "already holds a run" in last_line(capfd.readouterr().err)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert steps(out) == list(range(1, len(steps(out)) + 1))  # no other run has written between its lines
    assert not (out / LOCK).exists()


def test_a_killed_run_is_free_at_once(running: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, out = running
    process.kill()
    process.wait(60)
    assert (out / LOCK).exists()  # it has no meaning any more
    with locked(out):
        pass


def test_of_two_runs_that_begin_at_once_one_is_done_and_one_is_refused(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*MINIFT, *words, "--steps", "20", "--out", str(out)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=pipe, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    told = last_line(errors[0 if both[0].returncode else 1])
    assert told.startswith(f"minift: error: {out}: ")
    assert "another run is writing it" in told or "already holds a run" in told
    assert steps(out) == list(range(1, 21))


def test_a_run_that_began_after_the_first_look_is_found_under_the_lock(tmp_path: Path) -> None:
    """Both looked, one began and ended; the other has the lock only then."""
    (tmp_path / "config.json").write_text('{"job": "finetune", "inputs": {}, "train": {}}')
    with pytest.raises(InputError, match="already holds a run"), own_folder(tmp_path, False, World()):
        pass
    with own_folder(tmp_path, True, World()):
        assert (tmp_path / LOCK).exists()


def test_a_lock_keeps_other_processes_out_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    held = f"from pathlib import Path; from minift.storage.lock import locked\nwith locked(Path({str(folder)!r})): pass"
    with locked(folder):
        other = completed([sys.executable, "-c", held], env=ENV)
        assert "another run is writing it" in other.stderr
    assert not list(tmp_path.iterdir())
    completed([sys.executable, "-c", held], env=ENV, check=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file: cannot be written"), locked(tmp_path / "file"):
        pass


def test_a_run_that_died_when_it_had_taken_the_folder_is_begun_again(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    assert main([*words, "--steps", "1", "--out", str(tmp_path / "run")]) == 0


# Memory ---------------------------------------------------------------------------------------------------------------

# Messages of PyTorch, and what is reported of them.
FULL = {
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 79421440 bytes.": "79,421,440 bytes",
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB": "2.00 GiB",
}


@pytest.mark.parametrize("words_of_torch", FULL)
def test_an_error_of_memory_is_known_by_its_words(words_of_torch: str) -> None:
    error = RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {words_of_torch}")
    if "CUDA" in words_of_torch:
        error = torch.OutOfMemoryError(words_of_torch)
    assert is_out_of_memory(error)
    assert out_of_memory(error) == f"out of memory: {FULL[words_of_torch]} more could not be allocated"
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_real_failure_to_allocate_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    assert is_out_of_memory(caught.value)
    assert out_of_memory(caught.value) == f"out of memory: {2**54:,} bytes more could not be allocated"


def test_the_steps_before_memory_ran_out_are_saved(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out, taken = tmp_path / "whole", tmp_path / "run", train.train_step

    def third_is_too_large(state: Any, *arguments: Any) -> Any:
        if state.step == 2:
            torch.empty(2**52)
        return taken(state, *arguments)

    assert main([*words, "--steps", "4", "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", third_is_too_large)
        assert main([*words, "--steps", "4", "--out", str(out)]) == 1
    line = last_line(capfd.readouterr().err)
    failed = "step 3: out of memory: 18,014,398,509,481,984 bytes more could not be allocated"
    assert line.startswith(f"minift: error: {failed}; ")
    assert "--batch-size" in line
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    for file in ("final/model.pt", "compare.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


def limited(megabytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `minift …` with that much address space in addition to what its imports have taken."""
    script = (
        "import resource, sys, torch, minift.runs.finetune, minift.runner; from minift.cli import main\n"
        "status = open('/proc/self/status', encoding='utf-8').read().split()\n"
        f"limit = int(status[status.index('VmSize:') + 1]) * 1024 + {megabytes} * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return completed([sys.executable, "-c", script, *arguments], env=ENV)


linux = pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs Linux")


@linux
@pytest.mark.slow
def test_a_batch_too_large_for_the_machine_says_what_to_lower(words: list[str], tmp_path: Path) -> None:
    pairs = [{"question": "word " * 200, "answer": f"{i} " * 100} for i in range(600)]
    many = write_jsonl(tmp_path / "many.jsonl", pairs)
    command = [*words, "--data", str(many), "--steps", "2", "--out", str(tmp_path / "run")]
    done = limited(300, *command, "--batch-size", "512")
    assert done.returncode == 1, done.stderr
    assert "out of memory: " in last_line(done.stderr)
    assert "lower --batch-size and raise --grad-accum, or --checkpoint-activations" in last_line(done.stderr)
    again = limited(300, *command[:-1], str(tmp_path / "again"), "--batch-size", "4")  # the advice helps
    assert again.returncode == 0, again.stderr


@linux
@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "convert", "compare"])
def test_a_model_too_large_for_the_machine_is_one_line(command: str, small_checkpoint: Path, tmp_path: Path) -> None:
    """The model is a sparse file of a gigabyte, which takes no room on the disk."""
    large = tmp_path / "large.bin"
    width, hidden, layers, heads, vocabulary, length = 2_048, 8_192, 4, 16, 2_048, 512
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    large.write_bytes(struct.pack("<7i", width, hidden, layers, heads, heads, vocabulary, length))
    os.truncate(large, HEADER_BYTES[0] + 4 * sum(count for _, count in order(shape, 0)))
    assert large.stat().st_size > 2**30 > 100 * 512 * large.stat().st_blocks
    shutil.copy(small_checkpoint / "tokenizer.model", tmp_path)
    pair = write_jsonl(tmp_path / "p.jsonl", [{"question": "What is a noun?", "answer": "A word."}])
    rest = {
        "generate": ["--model", str(large), "--prompt", "Hello"],
        "convert": [str(large), str(tmp_path / "out"), "--to", "native"],
        "compare": [str(large), str(large), "--data", str(pair)],
    }[command]
    done = limited(200, command, *rest)
    assert done.returncode in (1, 2), done.stderr
    assert "allocate memory" in last_line(done.stderr) or "out of memory" in last_line(done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# The clock ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-1e9, 1e9, "random"])
def test_a_clock_that_jumps_changes_nothing_but_the_dates(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float | str
) -> None:
    """It is set back by 30 years in the middle of a run, or forward, or anew whenever it is read."""
    real, draw, looks = time.time, random.Random(0), [0]

    def jumping() -> float:
        looks[0] += 1
        if jump == "random":
            return real() + draw.uniform(-1e9, 1e9)
        assert isinstance(jump, float)
        return real() + jump * (looks[0] > 5)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(tqdm.std, "time", jumping)
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert main([*words, "--steps", "6", "--save-every", "2", "--keep", "0", "--out", str(out)]) == 0
    assert looks[0] > 10
    monkeypatch.undo()
    assert main([*words, "--steps", "6", "--save-every", "2", "--keep", "0", "--out", str(whole)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    assert all(0 < line["seconds"] < 60 and line["tokens_per_second"] > 0 for line in lines)
    assert (out / "final" / "model.pt").read_bytes() == (whole / "final" / "model.pt").read_bytes()
    assert [path.name for path in sorted(out.glob("step_*"))] == ["step_000002", "step_000004", "step_000006"]
