"""The promise of `runs/finetune.py` and `runs/pretrain.py`: a job does what its settings say.

What a run reports is computed again from its parts: which pairs are held out, the first loss from the batch that the
seed draws, the validation loss id by id from the final model, the scores of both models. Two processes, with the
weights replicated or sharded, must come to the same model as one.
"""

import json
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.checkpoint import load_model
from minift.cli import main
from minift.config import FINETUNE, LlamaConfig, TrainConfig
from minift.costs.flops import training_flops_per_token
from minift.data.batches import PageBatches
from minift.data.records import Skipped
from minift.data.stream import DocumentStream
from minift.data.templates import template_named
from minift.distributed.world import World
from minift.errors import InputError
from minift.lora import LoRAConfig, adapter_weights, add_lora
from minift.model import Llama
from minift.runs import finetune as finetuning
from minift.runs import pretrain as pretraining
from minift.runs.finetune import finetune, finetune_job
from minift.runs.folder import FinetuneJob, PretrainJob
from minift.runs.pretrain import make_plan, open_pages, pretrain, pretrain_job
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import SMALL, encode_pair, plain_nll, write_jsonl
from tests.runs.ranks import by_two

N_PAIRS = 26
CONFIG = TrainConfig(
    steps=3, batch_size=4, lr=1e-3, dtype="float32", device="cpu", seed=5, template="qa", max_length=40
)
T = 32  # tokens of a row of pages


def pair(i: int) -> dict[str, str]:
    return {"question": f"What comes after {i}?", "answer": f"The number {i + 1}" + " or so" * (i % 5) + "."}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> FinetuneJob:
    data = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", map(pair, range(N_PAIRS)))
    return finetune_job(str(small_checkpoint), [str(data)])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> PretrainJob:
    """Return a job over three files of pages, whose text is under "body", and one of held-out pages."""
    folder, draw = tmp_path_factory.mktemp("pages"), random.Random(0)
    tokenizer.save(folder)
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    for name in ("a", "b", "c", "held-out"):
        texts = [" ".join(str(draw.randrange(999)) for _ in range(draw.randrange(5, 30))) for _ in range(90)]
        write_jsonl(folder / f"{name}.jsonl", [{"body": f"{name}: {text}", "text": "not this"} for text in texts])
    data = [str(folder / f"{name}.jsonl") for name in "abc"]
    return pretrain_job(str(folder / "shape.json"), data, str(folder), [str(folder / "held-out.jsonl")], "body")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def held_out(seed: int, count: int = N_PAIRS) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), max(1, round(count / 10))))


def nll(model: Llama, numbers: Sequence[int], tokenizer: Tokenizer, config: TrainConfig) -> tuple[float, int]:
    """Return the summed loss of some pairs' answers, id by id, and the number of their targets."""
    total, targets = 0.0, 0
    for i in numbers:
        (found,) = finetuning.read_all_conversations([str(PAIR_FILES[i])])
        example = encode_pair(found, template_named(config.template), tokenizer, config.max_length)
        assert example is not None
        total += plain_nll(model, [*example.prompt, *example.answer], len(example.prompt))
        targets += len(example.answer)
    return total, targets


PAIR_FILES: dict[int, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def one_pair_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("single")
    for i in range(N_PAIRS):
        PAIR_FILES[i] = write_jsonl(folder / f"{i}.jsonl", [pair(i)])


class StartedError(Exception):
    """Ends a job when its state is about to be made, with what the state is made of."""


def what_starts(
    module: Any, run: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any
) -> tuple[Llama, Any, TrainConfig, World]:
    """Return what a job gives to `start_state`: model, batches, config and world."""

    def start_state(*given: Any, **named: Any) -> None:
        raise StartedError(given)

    monkeypatch.setattr(module, "start_state", start_state)
    with pytest.raises(StartedError) as started:
        run(*arguments)
    return started.value.args[0][:4]


# Finetuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 14, 15, 16, 47])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_tenth_of_the_pairs_is_held_out_by_the_seed(job: FinetuneJob, tmp_path: Path, count: int, seed: int) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", map(pair, range(count)))
    split = finetuning.read_data(finetune_job(job.model, [str(data)]), CONFIG.replace(seed=seed))
    expected = held_out(seed, count)
    assert [found.question for found in split.held_out] == [pair(i)["question"] for i in expected]
    rest = [pair(i)["question"] for i in range(count) if i not in expected]
    assert [found.question for found in split.training] == rest
    assert split.template == "qa"


def test_a_file_of_held_out_pairs_leaves_all_others_to_training(job: FinetuneJob, tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", [pair(100), pair(101)])
    split = finetuning.read_data(finetune_job(job.model, job.data, [str(test)]), CONFIG)
    assert [found.question for found in split.training] == [pair(i)["question"] for i in range(N_PAIRS)]
    assert [found.question for found in split.held_out] == [pair(i)["question"] for i in (100, 101)]


@pytest.fixture(scope="module")
def run(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    assert finetune(job, CONFIG, out)
    return out


def test_the_first_loss_is_that_of_the_batch_which_the_seed_draws(
    run: Path, job: FinetuneJob, tokenizer: Tokenizer
) -> None:
    training = [i for i in range(N_PAIRS) if i not in held_out(CONFIG.seed)]
    generator = torch.Generator().manual_seed(CONFIG.seed * 1_000_003)
    order = torch.randperm(len(training), generator=generator).tolist()
    chosen = [training[i] for i in order[: CONFIG.batch_size]]
    total, targets = nll(load_model(job.model), chosen, tokenizer, CONFIG)
    assert metrics(run)[0]["loss"] == pytest.approx(total / targets, rel=1e-5)


def test_the_validation_loss_is_that_of_all_held_out_pairs(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    total, targets = nll(load_model(run / "final"), held_out(CONFIG.seed), tokenizer, CONFIG)
    assert metrics(run)[-1]["validation_loss"] == pytest.approx(total / targets, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_the_validation_loss_does_not_depend_on_its_batches(
    run: Path, job: FinetuneJob, tokenizer: Tokenizer, tmp_path: Path, batch_size: int
) -> None:
    """Here the learning rate is so small that the model stays as it was."""
    config = CONFIG.replace(batch_size=batch_size, steps=1, lr=1e-12)
    assert finetune(job, config, tmp_path / "run")
    total, targets = nll(load_model(job.model), held_out(config.seed), tokenizer, config)
    assert metrics(tmp_path / "run")[-1]["validation_loss"] == pytest.approx(total / targets, rel=1e-5)


def test_both_models_are_compared_on_the_held_out_pairs(run: Path, job: FinetuneJob, tokenizer: Tokenizer) -> None:
    result = json.loads((run / "compare.json").read_text())
    numbers = held_out(CONFIG.seed)
    assert [sample["question"] for sample in result["samples"]] == [pair(i)["question"] for i in numbers]
    assert [sample["answer"] for sample in result["samples"]] == [pair(i)["answer"] for i in numbers]
    for when, model in (("before", job.model), ("after", run / "final")):
        total, targets = nll(load_model(model), numbers, tokenizer, CONFIG.replace(max_length=511))  # nothing is cut
        perplexity = torch.tensor(total / targets, dtype=torch.float64).exp().item()
        assert result[when]["perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_what_is_left_out_is_announced(job: FinetuneJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some answers are cut at 24 tokens, and some questions alone are as long as that."""
    long = " and so on" * 12
    records = [{"question": f"{i}?{long * (i == 3)}", "answer": f"{i}.{long * (i in (1, 2))}"} for i in range(8)]
    data, test = write_jsonl(tmp_path / "a.jsonl", records), write_jsonl(tmp_path / "b.jsonl", [*records[2:5], pair(1)])
    config = CONFIG.replace(max_length=24, template="plain")
    assert finetune(finetune_job(job.model, [str(data)], [str(test)]), config, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in load_model(job.model).parameters())
    assert lines[0] == f"{job.model}: {count:,} parameters, all of them trained, on cpu in float32"
    assert lines[1] == "7 pairs to train on (2 cut to 24 tokens, 1 dropped)"
    assert lines[2] == "4 pairs held out (1 without a target); template plain"


def test_it_is_said_which_records_have_no_target(job: FinetuneJob, tmp_path: Path) -> None:
    """Those to train on, or those held out: what helps the one does not help the other."""
    long = write_jsonl(tmp_path / "long.jsonl", [{"question": "a " * 90, "answer": "b"}] * 3)
    short = write_jsonl(tmp_path / "short.jsonl", [{"question": "a", "answer": "b"}] * 3)
    for data, test, which in ((short, long, "held-out record"), (long, short, "record to train on")):
        pairs = finetune_job(job.model, [str(data)], [str(test)])
        with pytest.raises(InputError, match=f"no {which} has a target within max_length 32; raise it"):
            finetune(pairs, FINETUNE.replace(steps=1, max_length=32, device="cpu"), tmp_path / "out")


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_packed_as_asked(job: FinetuneJob, tmp_path: Path, monkeypatch: Any, pack: bool) -> None:
    config = CONFIG.replace(pack=pack)
    _, batches, _, _ = what_starts(finetuning, finetune, monkeypatch, job, config, tmp_path / "run")
    assert batches.pack == pack


def test_the_template_that_was_chosen_is_part_of_the_settings(job: FinetuneJob, tmp_path: Path) -> None:
    carried = [{"question": f"### Question:\n{i}?\n\n### Answer:", "answer": f"{i}."} for i in range(12)]
    data = write_jsonl(tmp_path / "carried.jsonl", carried)
    assert finetune(finetune_job(job.model, [str(data)]), CONFIG.replace(template="auto"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["template"] == "carried"


def test_adapters_are_drawn_by_the_seed(job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(lora_rank=2)
    drawn = what_starts(finetuning, finetune, monkeypatch, job, config, tmp_path / "run")[0]
    for seed in (config.seed, 0):
        model = load_model(job.model)
        add_lora(model, LoRAConfig.of(config), torch.Generator().manual_seed(seed))
        expected, found = adapter_weights(model), adapter_weights(drawn)
        assert all(torch.equal(found[name], expected[name]) for name in expected) == (seed == config.seed)


# Pretraining ----------------------------------------------------------------------------------------------------------

PAGES = TrainConfig(
    steps=2, batch_size=4, grad_accum=2, lr=1e-3, max_length=T, dtype="float32", device="cpu", seed=5, shuffle_buffer=20
)


@pytest.mark.parametrize("changes", [{}, {"isolate": True}, {"seed": 0}, {"shuffle_buffer": 0}, {"max_length": 20}])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_pages_come_as_the_settings_say(
    pages: PretrainJob, tokenizer: Tokenizer, changes: dict[str, Any], rank: int
) -> None:
    config = PAGES.replace(**changes)
    stream = DocumentStream(pages.data, "body", None, config.seed, config.shuffle_buffer, Skipped())
    expected = PageBatches(stream, tokenizer, 4, config.max_length, isolate=config.isolate, rank=rank, world=2)
    found = open_pages(pages, tokenizer, config, World(rank=rank, size=2, parallel="ddp"))
    for _, one, other in zip(range(5), found, expected, strict=False):
        assert vars(one).keys() == vars(other).keys()
        for name in ("tokens", "targets", "positions", "document_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_first_weights_are_drawn_by_the_seed(
    pages: PretrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = what_starts(pretraining, pretrain, monkeypatch, pages, PAGES, tmp_path / "run")[0].state_dict()
    for seed in (PAGES.seed, 0):
        model = Llama(LlamaConfig.from_file(pages.config))
        model.init_weights(torch.Generator().manual_seed(seed))
        same = all(torch.equal(drawn[name], tensor) for name, tensor in model.state_dict().items())
        assert same == (seed == PAGES.seed)


@pytest.mark.parametrize("epochs", [0.5, 3])
def test_an_epoch_is_as_long_as_all_pages_together(pages: PretrainJob, tokenizer: Tokenizer, epochs: float) -> None:
    lines = [line for file in pages.data for line in Path(file).read_text().splitlines()]
    ids = sum(len(tokenizer.encode(json.loads(line)["body"], bos=True, eos=True)) for line in lines)
    plan = make_plan(pages, tokenizer, PAGES.replace(epochs=epochs, batch_size=1, max_length=8))
    assert plan.micro_batches == round(epochs * ids / 8) > 500
    assert plan.steps == -(-plan.micro_batches // 2)


@pytest.fixture(scope="module", params=[False, True], ids=["joined", "isolated"])
def pretrained(request: pytest.FixtureRequest, pages: PretrainJob, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a short run, and whether its pages were isolated."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert pretrain(pages, PAGES.replace(isolate=request.param), out)
    return out, request.param


def test_the_validation_loss_is_that_of_the_first_rows_of_held_out_pages(
    pretrained: Any, pages: PretrainJob, tokenizer: Tokenizer
) -> None:
    out, isolated = pretrained
    model = load_model(out / "final")
    ids: list[int] = []
    firsts: set[int] = set()
    for line in Path(pages.validation[0]).read_text().splitlines():
        firsts.add(len(ids))
        ids += tokenizer.encode(json.loads(line)["body"], bos=True, eos=True, special=False)
    assert len(ids) > 2 * 64 * T  # so that not all rows are taken
    total, targets = 0.0, 0
    for start in range(0, 64 * T, T):
        pieces = [start, *(i for i in range(start + 1, start + T) if isolated and i in firsts), start + T]
        for begin, end in pairwise(pieces):
            last = end if isolated and end in firsts else end + 1  # a page's first id is no target of the page before
            total += plain_nll(model, ids[begin:last], 1)
            targets += last - begin - 1
    assert metrics(out)[-1]["validation_loss"] == pytest.approx(total / targets, rel=1e-5)


def test_the_length_of_a_run_is_announced(
    pages: PretrainJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(pages, PAGES, tmp_path / "run")
    shape = LlamaConfig.from_file(pages.config)
    count = sum(tensor.numel() for tensor in Llama(shape).parameters())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pages.config}: {count:,} parameters, from random weights, on cpu in float32"
    flops = 2 * 2 * 4 * T * training_flops_per_token(shape, T)  # 2 steps of 2 micro-batches of 4 rows
    assert lines[1] == f"2 steps of {2 * 4 * T} tokens, {flops:.2g} FLOPs"


def test_a_bad_page_that_was_only_read_ahead_is_not_reported(
    pages: PretrainJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker encodes pages long before they are needed; a run reports what it met up to its last batch."""
    lines: list[Any] = [{"body": f"Page {i} says " + "more and " * 4_000} for i in range(12)]
    for place, shown in ((0, True), (6, False)):
        data = write_jsonl(tmp_path / f"{place}.jsonl", [*lines[:place], b"{oops", *lines[place:]])
        job = pretrain_job(pages.config, [str(data)], pages.tokenizer, text_field="body")
        assert pretrain(job, PAGES.replace(shuffle_buffer=0, workers=1), tmp_path / f"run{place}")
        assert ("skipped" in capsys.readouterr().out) == shown


# The end of a run -----------------------------------------------------------------------------------------------------


def test_the_final_model_has_the_format_that_was_asked_for(job: FinetuneJob, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    assert finetune(job, CONFIG.replace(save_format="hf"), tmp_path / "run")
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "final" / "model.pt").exists()


def test_a_finished_run_that_is_resumed_takes_no_step(run: Path, job: FinetuneJob) -> None:
    """Not even one without a checkpoint, which would begin again: its times would be others."""
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "compare.json", "final/model.pt")}
    assert finetune(job, CONFIG, run, resume=True)
    assert {name: (run / name).read_bytes() for name in before} == before


# Several processes ----------------------------------------------------------------------------------------------------


def assert_close(one: Path, other: Path) -> None:
    a, b = load_model(one / "final").state_dict(), load_model(other / "final").state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    for x, y in zip(metrics(one), metrics(other), strict=True):
        for key in ("loss", "grad_norm", "validation_loss", "tokens"):
            assert x.get(key) == (None if y.get(key) is None else pytest.approx(y[key], rel=1e-4)), key


@pytest.mark.parametrize("changes", [{"parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "fsdp", "lora_rank": 2}])
def test_two_processes_finetune_as_one_does(job: FinetuneJob, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = CONFIG.replace(**changes)
    by_two(finetune, job, config, tmp_path / "two")
    assert finetune(job, config.replace(parallel="auto"), tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "compare.json").is_file()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_pretrain_as_one_does(pages: PretrainJob, tmp_path: Path, parallel: str) -> None:
    by_two(pretrain, pages, PAGES.replace(parallel=parallel), tmp_path / "two")
    assert pretrain(pages, PAGES, tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(("steps", "limit"), [(2, None), (30, None), (30, 11), (90, None)])
def test_pretraining_says_how_often_the_pages_were_read(
    steps: int, limit: int | None, tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given in steps, it is known at the end; in epochs, from the beginning. Unusable records make no difference."""
    pages = [{"text": f"Page {i} of some words, and a few more. " * (1 + i % 3)} for i in range(200)]
    data = write_jsonl(tmp_path / "pages.jsonl", pages)
    words = ["pretrain", "--model", str(small_checkpoint), "--data", str(data), "--max-length", "64", "--device", "cpu"]
    words += ["--batch-size", "4", "--dtype", "float32", *(["--limit", str(limit)] if limit else [])]
    assert main([*words, "--steps", str(steps), "--out", str(tmp_path / "a")]) == 0
    (said,) = [
        line for line in capsys.readouterr().out.splitlines() if "passes over" in line or "first pass over" in line
    ]
    encoded = load_tokenizer(small_checkpoint).encode
    ids = sum(len(encoded(page["text"], bos=True, eos=True)) for page in pages[:limit])
    expected = steps * 4 * 64 / ids
    if expected < 1:
        assert said == "the run ended within its first pass over the pages"
    else:
        found = re.fullmatch(r"about (\d+\.\d) passes over the pages", said)
        assert found
        assert float(found[1]) == pytest.approx(expected, rel=0.05, abs=0.06)
    assert main([*words, "--epochs", "1.5", "--out", str(tmp_path / "b")]) == 0
    assert ", 1.5 passes over the pages, " in capsys.readouterr().out
