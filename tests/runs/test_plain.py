"""The promise of `--plain`: no kernel is installed, so the code that is read is the code that runs.

A job is stopped just before its first step, and the modules that it would train are looked at: without --plain some are
from `minift/kernels/`, with it none. Then both are trained, alone, with adapters and by two processes: the losses must
be the same but for rounding.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.config import TrainConfig
from minift.errors import InputError
from minift.model import DecoderLayer, RMSNorm
from minift.runs import common, loop
from minift.runs import finetune as finetuning
from minift.runs import pretrain as pretraining
from minift.runs.finetune import finetune, finetune_job
from minift.runs.folder import FinetuneJob, PretrainJob
from minift.runs.pretrain import pretrain, pretrain_job
from minift.runs.steps import step_folders
from minift.tokenizer.base import Tokenizer
from minift.train import TrainState
from tests.helpers import SMALL, write_jsonl
from tests.runs.ranks import by_two

CONFIG = TrainConfig(steps=20, batch_size=4, lr=3e-3, dtype="float32", device="cpu", max_length=40, template="qa")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> FinetuneJob:
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(20)]
    return finetune_job(str(small_checkpoint), [str(write_jsonl(tmp_path_factory.mktemp("a") / "a.jsonl", pairs))])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> PretrainJob:
    folder = tmp_path_factory.mktemp("pages")
    data = write_jsonl(folder / "a.jsonl", [{"text": f"The number {i} comes after {i - 1}."} for i in range(60)])
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    tokenizer.save(folder)
    return pretrain_job(str(folder / "shape.json"), [str(data)], str(folder), [str(data)])


class StoppedError(Exception):
    """Ends a job before its first step, with its state."""


def before_the_first_step(module: Any, monkeypatch: pytest.MonkeyPatch, run: Any, *arguments: Any) -> TrainState:
    def complete(run: Any, state: TrainState, resume: bool) -> None:
        raise StoppedError(state)

    monkeypatch.setattr(module, "complete", complete)
    with pytest.raises(StoppedError) as stopped:
        run(*arguments)
    state: TrainState = stopped.value.args[0]
    return state


def from_kernels(state: TrainState) -> set[str]:
    """Return the names of the classes of `minift/kernels/` that a state's modules and optimizer have."""
    kinds = {type(module) for module in state.objective.modules()} | {type(state.optimizer)}
    return {kind.__name__ for kind in kinds if kind.__module__.startswith("minift.kernels")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_plain_run_installs_no_kernel(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, lora_rank: int
) -> None:
    config = CONFIG.replace(dtype=dtype, lora_rank=lora_rank)
    state = before_the_first_step(finetuning, monkeypatch, finetune, job, config, tmp_path / "a", False, True)
    assert from_kernels(state) == set()
    assert {type(layer) for layer in state.model.layers} == {DecoderLayer}
    assert type(state.model.norm) is RMSNorm
    state = before_the_first_step(finetuning, monkeypatch, finetune, job, config, tmp_path / "b")
    assert len(from_kernels(state)) > 3


def test_a_plain_pretraining_installs_no_kernel_and_is_not_compiled(
    pages: PretrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a compiler would pay: that the run's length chooses it is part of its settings all the same."""
    compiled: list[bool] = []
    monkeypatch.setattr(DecoderLayer, "compile", lambda layer: compiled.append(True))
    monkeypatch.setattr(pretraining, "choose_compile", lambda *given: True)
    for plain in (True, False):
        given = (pages, CONFIG, tmp_path / str(plain), False, plain)
        state = before_the_first_step(pretraining, monkeypatch, pretrain, *given)
        assert bool(from_kernels(state)) != plain
        assert bool(compiled) != plain


def test_to_be_plain_and_compiled_is_refused(job: FinetuneJob, pages: PretrainJob, tmp_path: Path) -> None:
    for run, given in ((finetune, job), (pretrain, pages)):
        with pytest.raises(InputError, match=r"--plain .* --compile .* give one of them"):
            run(given, CONFIG.replace(compile=True), tmp_path / "run", plain=True)  # type: ignore[operator]
        assert not (tmp_path / "run").exists()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_but_for_rounding(one: Path, other: Path) -> None:
    mine, theirs = metrics(one), metrics(other)
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in mine] == pytest.approx([record[key] for record in theirs], rel=1e-5), key
    assert mine[-1].get("validation_loss") == pytest.approx(theirs[-1].get("validation_loss"), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"checkpoint_activations": True}, {"pack": False}])
def test_a_plain_finetuning_has_the_same_losses(job: FinetuneJob, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = CONFIG.replace(**changes)
    assert finetune(job, config, tmp_path / "plain", plain=True)
    assert finetune(job, config, tmp_path / "default")
    assert_same_but_for_rounding(tmp_path / "plain", tmp_path / "default")
    settings = [(tmp_path / name / "config.json").read_text() for name in ("plain", "default")]
    assert settings[0] == settings[1]
    results = [json.loads((tmp_path / name / "compare.json").read_text()) for name in ("plain", "default")]
    assert results[0]["before"]["perplexity"] == pytest.approx(results[1]["before"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_plain_pretraining_has_the_same_losses(pages: PretrainJob, tmp_path: Path, isolate: bool) -> None:
    config = CONFIG.replace(isolate=isolate)
    assert pretrain(pages, config, tmp_path / "plain", plain=True)
    assert pretrain(pages, config, tmp_path / "default")
    assert_same_but_for_rounding(tmp_path / "plain", tmp_path / "default")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_plain_processes_have_the_same_losses(job: FinetuneJob, tmp_path: Path, parallel: str) -> None:
    by_two(finetune, job, CONFIG.replace(parallel=parallel), tmp_path / "plain", False, True)
    assert finetune(job, CONFIG, tmp_path / "default")
    assert_same_but_for_rounding(tmp_path / "plain", tmp_path / "default")


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain_first", [True, False])
def test_a_run_may_be_resumed_the_other_way(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_first: bool, capsys: Any
) -> None:
    """It stops after its fifth step, as by Ctrl-C, and prints the command that continues it as it was begun."""
    out = tmp_path / "run"

    class StopAfterFive(loop.StopSignal):
        requested = property(lambda self: len(metrics(out)) >= 5, lambda self, value: None)  # type: ignore[assignment]

    words = ["finetune", "--model", job.model, "--data", *job.data, "--out", str(out), "--device", "cpu"]
    words += ["--steps", "12", "--dtype", "float32", "--batch-size", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "StopSignal", StopAfterFive)
        assert main([*words, *["--plain"] * plain_first]) == 1
    assert step_folders(out) == [out / "step_000005"]
    assert ("--plain" in capsys.readouterr().out.splitlines()[-1]) == plain_first
    assert main(["finetune", "--resume", "--out", str(out), *["--plain"] * (not plain_first)]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert_same_but_for_rounding(out, tmp_path / "whole")


def test_every_command_that_runs_a_model_can_be_plain(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says the same, and where a kernel is asked for, the plain one does without it."""
    import minift.kernels

    data = [*job.data]
    commands = [
        ["generate", "--model", job.model, "--prompt", "What", "--max-new-tokens", "8"],
        ["compare", job.model, job.model, "--data", *data],
        ["evaluate", "--model", job.model, "--data", *data],
        ["explain", "What is it?", "--model", job.model],
    ]
    shown = {}
    for plain in (False, True):
        if plain:
            for name in ("fast_decoder", "install", "choose", "choose_for_reading"):
                monkeypatch.setattr(minift.kernels, name, lambda *given: pytest.fail("a kernel was asked for"))
        for words in commands:
            assert main([*words, *["--plain"] * plain]) == 0
            shown[words[0], plain] = capsys.readouterr().out
    for words in commands[:3]:
        assert shown[words[0], True] == shown[words[0], False]
