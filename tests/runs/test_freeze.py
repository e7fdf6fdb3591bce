"""The promise of `--freeze`: parameters that match stay as they are, bit for bit, and the others learn as they would.

The others are compared with a plain step in which only they are given to `torch`'s AdamW.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minift import kernels
from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.errors import InputError
from minift.model import Llama
from minift.pack import IGNORE
from minift.runs.finetune import finetune, finetune_job
from minift.runs.folder import FinetuneJob
from minift.runs.freeze import freeze, frozen_names
from minift.runs.pretrain import pretrain, pretrain_job
from minift.runs.start import start_state
from minift.runs.steps import save_step
from minift.tokenizer.base import Tokenizer
from minift.train import train_step
from tests.helpers import bits, make_examples, random_model, small_model, write_jsonl
from tests.runs.ranks import by_two

CONFIG = TrainConfig(
    steps=4, batch_size=4, lr=1e-2, weight_decay=0.1, dtype="float32", device="cpu", template="qa", max_length=40
)
SEVERAL = [
    ("embed_tokens*",),
    ("lm_head.weight",),
    ("layers.0.*",),
    ("*norm*",),
    ("embed_tokens*", "layers.*"),  # all but the last norm and the head
    ("layers.1.*", "norm.weight", "lm_head*"),
    ("*.q_proj.*", "layers.0.mlp.down_proj.weight"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return a checkpoint whose head is a tensor of its own."""
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512, "tie_word_embeddings": False}
    save_model(folder := tmp_path_factory.mktemp("models") / "untied", small_model(std=0.02, **shape), tokenizer)
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model: Path) -> FinetuneJob:
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(26)]
    data = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)
    return finetune_job(str(model), [str(data)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def changed(folder: Path, base: Path) -> set[str]:
    before, after = weights(base), weights(folder)
    return {name for name in before if not torch.equal(before[name], after[name])}


# Which ones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "tied", "expected"),
    [
        ("embed_tokens.weight", False, {"embed_tokens.weight"}),
        ("embed_tokens*", True, {"embed_tokens.weight"}),
        ("lm_head*", False, {"lm_head.weight"}),
        ("lm_head.weight", True, {"embed_tokens.weight"}),
        ("norm.*", False, {"norm.weight"}),
        ("model.norm.weight", False, {"norm.weight"}),
        ("layers.[01].mlp.up_proj.*", False, {f"layers.{i}.mlp.up_proj.weight" for i in (0, 1)}),
        ("LAYERS*", False, set()),
        ("embed_tokens", False, set()),
        ("", False, set()),
    ],
)
def test_a_pattern_matches_names(pattern: str, tied: bool, expected: set[str]) -> None:
    model = small_model(tie_word_embeddings=tied)
    names = [name for name, _ in model.named_parameters()]
    if expected:
        assert frozen_names(names, [pattern]) == expected
    else:
        with pytest.raises(InputError, match="matches no parameter"):
            frozen_names(names, [pattern])


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("embed_tokens", "embed_tokens.weight"),
        ("layers.9.*", "layers.1.*"),
        ("*qproj*", "*q_proj*"),
        ("embed_token.*", "embed_tokens.*"),
    ],
)
def test_the_nearest_name_is_offered(pattern: str, meant: str) -> None:
    names = [name for name, _ in small_model().named_parameters()]
    with pytest.raises(InputError, match="did you mean") as raised:
        frozen_names(names, ["*norm*", pattern])
    assert repr(pattern) in str(raised.value)
    found = str(raised.value).split("did you mean ")[1].split("?")[0]
    assert found[:6] == meant[:6]
    assert frozen_names(names, [found])


def test_what_makes_no_sense_is_refused(job: FinetuneJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", "--model", job.model, "--data", *job.data, "--out", str(tmp_path / "run"), "--device", "cpu"]
    for given, message in (
        (["--freeze", "*"], "freezes every parameter; nothing is left to train"),
        (["--freeze", "embed*", "layers*", "norm*", "lm_head*"], "nothing is left to train"),
        (["--freeze", "layers.7.*"], "'layers.7.*' matches no parameter"),
        (["--freeze", "*norm*", "--lora-rank", "2"], "choose by --lora-targets"),
    ):
        assert main([*words, *given]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="must be names or patterns"):
        TrainConfig(freeze=(1,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="freeze is 7; it must be tuple"):
        TrainConfig.from_dict({"freeze": 7})
    assert TrainConfig(freeze="*norm*").freeze == ("*norm*",)  # type: ignore[arg-type]
    config = TrainConfig(freeze=("a", "b"))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# What a step does -----------------------------------------------------------------------------------------------------


def steps(model: Llama, patterns: Sequence[str], names: Sequence[str], dtype: str) -> tuple[list[Any], Llama]:
    """Take two steps with some kernels; return what they report, and the model."""
    examples = make_examples([3, 5, 2, 6, 4, 7, 1, 5])
    config = CONFIG.replace(dtype=dtype, clip=0.5)
    freeze(model, patterns)
    state = start_state(model, PairBatches(examples, 4, pad_id=2, seed=0), config, names=names)
    batches = iter(state.batches)
    results = [train_step(state, [next(batches), next(batches)], 1e-2, config) for _ in range(2)]
    return [(result.loss, result.grad_norm) for result in results], model


@pytest.mark.parametrize("patterns", SEVERAL, ids=lambda patterns: " ".join(patterns))
def test_the_others_learn_by_the_formula_and_the_norm_is_theirs(patterns: tuple[str, ...]) -> None:
    model, plain = random_model(tie_word_embeddings=False), random_model(tie_word_embeddings=False)
    frozen = frozen_names([name for name, _ in model.named_parameters()], patterns)
    found, _ = steps(model, patterns, [], "float32")
    before = bits(plain)
    trained = {name: p for name, p in plain.named_parameters() if name not in frozen}
    groups = [
        {"params": [p for p in trained.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    batches = iter(PairBatches(make_examples([3, 5, 2, 6, 4, 7, 1, 5]), 4, pad_id=2, seed=0))
    for loss, norm in found:
        window = [next(batches), next(batches)]
        total = torch.zeros(())
        for batch in window:
            logits = plain(batch.tokens, batch.positions, batch.documents)
            total = total + F.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
        total = total / sum(batch.n_targets for batch in window)
        plain.zero_grad()
        total.backward()
        squares = sum(float(p.grad.square().sum()) for p in trained.values() if p.grad is not None)
        assert (loss, norm) == pytest.approx((float(total.detach()), math.sqrt(squares)), rel=1e-4)
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None
        else:
            assert not torch.equal(parameter, before[name]), name
            torch.testing.assert_close(parameter, trained[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("patterns", SEVERAL, ids=lambda patterns: " ".join(patterns))
def test_every_kernel_leaves_them_alone(patterns: tuple[str, ...], tied: bool) -> None:
    on_cpu = [name for name in kernels.ALL if name not in ("flex", "malloc", "compiling")]
    before = bits(random_model(tie_word_embeddings=tied))
    frozen = frozen_names(before, patterns)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.05)):
        expected, plain = steps(random_model(tie_word_embeddings=tied), patterns, [], dtype)
        for names in [*([name] for name in on_cpu), on_cpu]:
            found, model = steps(random_model(tie_word_embeddings=tied), patterns, names, dtype)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=tolerance), (names, dtype)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]) == (name in frozen), (name, names, dtype)
                if dtype == "float32":
                    torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-3, atol=1e-4, msg=name)


def test_frozen_parameters_have_no_moments_and_are_in_the_step_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size)
    freeze(model, ["embed_tokens*", "layers.0.*"])
    batches = PairBatches(make_examples([3, 5, 2, 6]), 4, pad_id=2, seed=0)
    state = start_state(model, batches, CONFIG)
    train_step(state, [next(iter(batches))], 1e-2, CONFIG)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(state.optimizer.state) == set(trained)
    folder = save_step(tmp_path, state, tokenizer)
    saved = weights(folder)
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_trains_and_resumes_bit_for_bit(
    job: FinetuneJob, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = [
        "finetune",
        "--model",
        job.model,
        "--data",
        *job.data,
        "--out",
        str(out),
        "--device",
        "cpu",
        "--steps",
        "4",
    ]
    words += [
        "--dtype",
        "float32",
        "--batch-size",
        "4",
        "--max-length",
        "64",
        "--save-every",
        "2",
        "--keep",
        "0",
        "--lr",
        "1e-2",
    ]
    assert main([*words, "--freeze", "embed_tokens*", "*norm*", "--checkpoint-activations"]) == 0
    before = weights(model)
    trained = {name for name in before if "norm" not in name and "embed" not in name}
    count = sum(before[name].numel() for name in trained)
    assert f"parameters, {count:,} of them trained, on cpu" in capsys.readouterr().out
    assert changed(out / "final", model) == trained
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{count:,} of them trained" in page
    assert "--freeze &#x27;embed_tokens*&#x27; &#x27;*norm*&#x27;" in page
    whole = weights(out / "final")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000004")
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out / "final").items())
    assert main(["finetune", "--resume", "--out", str(out), "--freeze", "embed_tokens*", "*norm*"]) == 0
    assert main(["finetune", "--resume", "--out", str(out), "--freeze", "*norm*"]) == 2


@pytest.mark.parametrize("given", ["embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_is_frozen_under_either_name(
    given: str, job: FinetuneJob, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = finetune_job(str(small_checkpoint), list(job.data))
    assert finetune(tied, CONFIG.replace(freeze=(given,), steps=1), tmp_path / "run")
    assert "the embedding and the head are one tensor (tied)" in capsys.readouterr().out
    assert changed(tmp_path / "run" / "final", small_checkpoint) == set(weights(small_checkpoint)) - {
        "embed_tokens.weight"
    }


def test_pretraining_freezes_too(
    job: FinetuneJob, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = write_jsonl(tmp_path / "pages.jsonl", [{"text": f"page {i} of many"} for i in range(60)])
    config = CONFIG.replace(template="auto", freeze=("layers.0.*",), steps=2, max_length=16)
    assert pretrain(pretrain_job(model=str(model), data=[str(pages)]), config, tmp_path / "run")
    names = {name for name in weights(model) if not name.startswith("layers.0.")}
    assert changed(tmp_path / "run" / "final", model) == names
    random = pretrain_job(str(model / "config.json"), [str(pages)], str(model))
    assert pretrain(random, config, tmp_path / "other")
    count = sum(tensor.numel() for name, tensor in weights(model).items() if name in names)
    assert capsys.readouterr().out.count(f"{count:,} of them trained, on cpu") == 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "patterns", [("embed_tokens*", "layers.0.*"), ("*.q_proj.*", "*norm*"), ("lm_head*", "layers.1.*")]
)
def test_two_processes_freeze_as_one_does(
    job: FinetuneJob, model: Path, tmp_path: Path, parallel: str, patterns: tuple[str, ...]
) -> None:
    config = CONFIG.replace(freeze=patterns, save_every=2, grad_accum=2, steps=3)
    by_two(finetune, job, config.replace(parallel=parallel), tmp_path / "two")
    assert finetune(job, config, tmp_path / "one")
    one, two = weights(tmp_path / "one" / "final"), weights(tmp_path / "two" / "final")
    frozen = frozen_names(one, patterns)
    assert changed(tmp_path / "two" / "final", model) == set(one) - frozen
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_step_folder_of_a_sharded_run_holds_the_frozen_weights(
    job: FinetuneJob, model: Path, tmp_path: Path
) -> None:
    """A resumed run takes them from there, as all other weights: not from the base, which may be another by then."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(model, base)
    moved = finetune_job(str(base), list(job.data))
    config = CONFIG.replace(freeze=("embed_tokens*", "layers.0.*"), save_every=2, keep=0, parallel="fsdp")
    by_two(finetune, moved, config, out)
    whole = weights(out / "final")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000004")
    other = load_model(base)
    with torch.no_grad():
        other.embed_tokens.weight.mul_(2)
    from minift.runs.steps import load_step

    freeze(other, config.freeze)
    state = start_state(other, PairBatches([], 4, 2, 0), config.replace(parallel="auto"))
    state.batches = type("Anywhere", (), {"load_state_dict": lambda self, given: None})()
    load_step(out / "step_000002", state)
    assert torch.equal(other.embed_tokens.weight, whole["embed_tokens.weight"])
