"""The promise of `minift pretrain --model`: the training of a model goes on by the formulas, with its own tokenizer.

The final weights are compared with those of a loop of ten lines around `torch`'s own loss and AdamW.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minift.checkpoint import load_model
from minift.cli import main
from minift.config import CONTINUED, PRETRAIN, TrainConfig
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.optim import learning_rate
from minift.runs.folder import PretrainJob
from minift.runs.pretrain import pretrain, pretrain_job
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import write_jsonl
from tests.runs.ranks import by_two

CONFIG = TrainConfig(steps=4, batch_size=2, lr=1e-3, dtype="float32", device="cpu", max_length=32, shuffle_buffer=5)
FLAGS = ["--steps", "4", "--batch-size", "2", "--dtype", "float32", "--device", "cpu", "--max-length", "32"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(999)) for _ in range(draw.randrange(5, 30))) for _ in range(90)]
    return write_jsonl(tmp_path_factory.mktemp("pages") / "pages.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def job(small_checkpoint: Path, pages: Path) -> PretrainJob:
    return pretrain_job(model=str(small_checkpoint), data=[str(pages)])


@pytest.fixture
def chatty(small_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the model with a chat template in its folder."""
    folder = tmp_path / "chatty"
    shutil.copytree(small_checkpoint, folder)
    (folder / "SHA256SUMS").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_the_weights_are_those_of_a_plain_loop(job: PretrainJob, tmp_path: Path) -> None:
    assert pretrain(job, CONFIG, tmp_path / "run")
    model, tokenizer = load_model(job.model), load_tokenizer(job.model)
    stream = DocumentStream(job.data, seed=CONFIG.seed, shuffle_buffer=CONFIG.shuffle_buffer)
    batches = iter(PageBatches(stream, tokenizer, 2, 32))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(4):
        batch = next(batches)
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4, CONFIG)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, tensor in weights(tmp_path / "run" / "final").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)


def test_the_command_needs_a_model_and_pages(
    chatty: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--model", str(chatty), "--data", str(pages), "--out", str(out), *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert f"{chatty}: " in printed
    assert "all of them trained" in printed
    assert f"learning rate up to {PRETRAIN.lr / 10:g}, a tenth" in printed
    run = json.loads((out / "config.json").read_text())
    assert run["train"]["lr"] == CONTINUED.lr == PRETRAIN.lr / 10
    assert run["inputs"]["model"] == run["inputs"]["tokenizer"] == str(chatty)
    assert (out / "final" / "chat_template.jinja").read_text() == "{{ messages }}"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"--model {chatty}" in page
    assert "--config" not in page


def test_a_tokenizer_of_ones_own_keeps_the_models_chat_template(
    chatty: Path, pages: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    other = tmp_path / "tokenizer.model"
    job = pretrain_job(model=str(chatty), data=[str(pages)], tokenizer=str(other))
    assert pretrain(job, CONFIG.replace(steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "final" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_tokenizer_that_does_not_fit_is_refused(job: PretrainJob, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert main(["tokenizer", "train", "--data", *job.data, "--vocab-size", "270", "--out", str(small)]) == 0
    other = pretrain_job(model=job.model, data=job.data, tokenizer=str(small))
    with pytest.raises(InputError, match=r"has 270 pieces, the tokenizer of .* 2048: they do not fit"):
        pretrain(other, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "bundled", "--config", "bundled"], "--config bundled is for random weights, and --model bundled"),
        ([], "pretrain needs --config or --model"),
        (["--config", "bundled"], "pretrain needs --tokenizer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: list[str], message: str, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *given, "--data", str(pages), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_resumes_bit_for_bit(job: PretrainJob, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain(job, CONFIG.replace(save_every=2, keep=0), out)
    whole = weights(out / "final")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000004")
    assert main(["pretrain", "--resume", "--out", str(out)]) == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out / "final").items())


def test_a_run_of_an_earlier_version_resumes(small_checkpoint: Path, pages: Path, tmp_path: Path) -> None:
    """Its config.json says nothing of a model."""
    out, shape = tmp_path / "run", str(small_checkpoint / "config.json")
    job = pretrain_job(shape, [str(pages)], str(small_checkpoint))
    assert pretrain(job, CONFIG.replace(save_every=2, keep=0), out)
    whole = weights(out / "final")
    shutil.rmtree(out / "final")
    run: dict[str, Any] = json.loads((out / "config.json").read_text())
    del run["inputs"]["model"]
    (out / "config.json").write_text(json.dumps(run))
    assert main(["pretrain", "--resume", "--out", str(out)]) == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out / "final").items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_on_as_one_does(job: PretrainJob, tmp_path: Path, parallel: str) -> None:
    by_two(pretrain, job, CONFIG.replace(parallel=parallel), tmp_path / "two")
    assert pretrain(job, CONFIG, tmp_path / "one")
    one, two = weights(tmp_path / "one" / "final"), weights(tmp_path / "two" / "final")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=name)
