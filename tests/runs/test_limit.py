"""The promise of `--limit N`: the first N records of the data and no other, announced, and kept by a resume."""

import json
import os
import shutil
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from minift.checkpoint import load_model
from minift.cli import main
from minift.config import FINETUNE, TrainConfig
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.runs.finetune import finetune_job, read_data
from minift.runs.pretrain import make_plan, open_pages, pretrain, pretrain_job
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import write_jsonl

FLAGS = ["--device", "cpu", "--dtype", "float32", "--batch-size", "4"]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Write three files of 10 pages each, in whose names their order is not that of their numbers."""
    return [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"page {10 * i + j}"} for j in range(10)])
        for i, name in enumerate("abc")
    ]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    records = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(30)]
    return write_jsonl(tmp_path / "pairs.jsonl", records)


@pytest.mark.parametrize("buffer", [0, 4, 1_000])
@pytest.mark.parametrize("limit", [1, 7, 10, 13, 30, 99])
def test_each_epoch_has_the_first_documents_once(files: list[Path], buffer: int, limit: int) -> None:
    first = Counter(f"page {i}" for i in range(min(limit, 30)))
    texts = iter(DocumentStream(files, seed=3, shuffle_buffer=buffer, limit=limit))
    epochs = [list(islice(texts, len(first))) for _ in range(3)]
    assert [Counter(epoch) for epoch in epochs] == [first] * 3
    assert (epochs[0] == epochs[1] == list(first)) == (buffer == 0 or limit == 1)


def test_the_files_after_the_limit_are_not_opened(files: list[Path]) -> None:
    files[1].write_bytes(b"{broken")
    files[2].write_bytes(b"\xff")
    assert list(DocumentStream(files, epochs=2, limit=10)) == [f"page {i}" for i in range(10)] * 2


def test_a_pipe_that_was_read_to_the_limit_has_not_ended(tmp_path: Path) -> None:
    pipe = tmp_path / "pages.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b'{"text": "a page"}\n' * 9,))
    writer.start()
    texts = iter(DocumentStream([pipe], limit=4))
    assert list(islice(texts, 4)) == ["a page"] * 4
    with pytest.raises(InputError, match="was read to --limit after 4 documents, and cannot be read again"):
        next(texts)
    writer.join()


@pytest.mark.parametrize("buffer", [0, 4, 1_000])
def test_a_limited_stream_resumes_anywhere(files: list[Path], buffer: int) -> None:
    def stream(limit: int | None = 13) -> DocumentStream:
        return DocumentStream(files, epochs=2, seed=1, shuffle_buffer=buffer, limit=limit)

    whole = list(stream())
    for place in range(27):
        before, after = stream(), stream()
        head = list(islice(before, place))
        after.load_state_dict(before.state_dict())
        assert head + list(after) == whole, place
    with pytest.raises(InputError, match="saved with limit 13, and now it is 12"):
        stream(12).load_state_dict(before.state_dict())
    with pytest.raises(InputError, match="saved with limit 13, and now it is None"):
        stream(None).load_state_dict(before.state_dict())


def test_a_state_of_an_earlier_version_has_no_limit(files: list[Path]) -> None:
    before, after = DocumentStream(files, epochs=1, shuffle_buffer=4), DocumentStream(files, epochs=1, shuffle_buffer=4)
    head, state = list(islice(before, 5)), before.state_dict()
    del state["settings"]["limit"]
    after.load_state_dict(state)
    assert head + list(after) == list(DocumentStream(files, epochs=1, shuffle_buffer=4))


def test_pretraining_reads_and_counts_the_first_documents(
    files: list[Path], small_checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = pretrain_job(model=str(small_checkpoint), data=[str(file) for file in files])
    config = TrainConfig(epochs=3, batch_size=1, max_length=4, limit=12, shuffle_buffer=5, dtype="float32")
    ids = sum(len(tokenizer.encode(f"page {i}", bos=True, eos=True)) for i in range(12))
    assert make_plan(job, tokenizer, config).micro_batches == round(3 * ids / 4)
    config = config.replace(steps=20, device="cpu", save_every=10, keep=0)
    assert pretrain(job, config, tmp_path / "run")
    assert "--limit: no more than the first 12 documents" in capsys.readouterr().out
    final = load_model(tmp_path / "run" / "final").state_dict()
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "step_000020")
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "run")]) == 0
    again = load_model(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in final.items())


def test_batches_are_those_of_a_shorter_file(files: list[Path], small_checkpoint: Path, tmp_path: Path) -> None:
    from minift.distributed.world import World

    lines = b"".join(file.read_bytes() for file in files).splitlines(keepends=True)
    short = tmp_path / "short.jsonl"
    short.write_bytes(b"".join(lines[:17]))
    config = TrainConfig(steps=9, batch_size=2, max_length=5, shuffle_buffer=6, limit=17)
    tokenizer = load_tokenizer(small_checkpoint)
    found = []
    for data, limit in (([str(file) for file in files], 17), ([str(short)], None)):
        job = pretrain_job(model=str(small_checkpoint), data=data)
        batches = open_pages(job, tokenizer, config.replace(limit=limit), World())
        found.append([batch.tokens for batch in islice(batches, 9)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_pairs_are_cut_before_some_are_held_out(pairs: Path, small_checkpoint: Path) -> None:
    job = finetune_job(str(small_checkpoint), [str(pairs)])
    split = read_data(job, FINETUNE.replace(limit=12))
    assert len(split.held_out) == 1
    asked = sorted(int(one.question.split()[-1][:-1]) for one in [*split.training, *split.held_out])  # type: ignore[union-attr]
    assert asked == list(range(12))
    tested = read_data(finetune_job(str(small_checkpoint), [str(pairs)], [str(pairs)]), FINETUNE.replace(limit=1))
    assert (len(tested.training), len(tested.held_out)) == (1, 30)


def test_the_command_says_what_it_uses_and_a_resume_keeps_it(
    pairs: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["finetune", "--model", str(small_checkpoint), "--data", str(pairs), "--out", str(out), *FLAGS]
    assert main([*words, "--limit", "10", "--steps", "2", "--save-every", "1", "--keep", "0"]) == 0
    assert "--limit: the first 10 of 30 pairs\n9 pairs to train on" in capsys.readouterr().out
    shutil.rmtree(out / "final")
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "--limit: the first 10 of 30 pairs" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["train"]["limit"] == 10
    assert main(["finetune", "--resume", "--out", str(out), "--limit", "11"]) == 2
    assert "--limit is 11, but the run" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "message"), [("0", "limit is 0; it must be at least 1"), ("1", "give at least 2")])
def test_too_few_are_refused(
    pairs: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    limit: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    words = ["finetune", "--model", str(small_checkpoint), "--data", str(pairs), "--out", str(out), *FLAGS]
    assert main([*words, "--limit", limit]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
