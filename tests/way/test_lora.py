"""An adapter changes a model by (alpha / r) B A, and by nothing else.

Held here: at first the model is the base, to the bit; gradients against the dense matrix's; merged against unmerged;
what is trained and what is saved; runs that are resumed. Adapters on disk are in `formats/test_peft.py`.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from minift import load_model, load_tokenizer, save_model
from minift.cache import KVCache
from minift.cli import main
from minift.config import FINETUNE, LORA_TARGETS
from minift.data.batches import PairBatches
from minift.generate import generate
from minift.kernels.decode import Decoder
from minift.lora import LoRAConfig, LoRALinear, adapter_weights, has_adapter, merge, merged_weights
from minift.loss import next_token_loss
from minift.optim import make_optimizer
from minift.pack import collate
from minift.runs.start import start_state
from minift.train import validation_loss
from tests.helpers import adapted_model, make_examples, plain_nll, small_model, write_jsonl

TOKENS = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("targets", [LORA_TARGETS, ("k_proj",)], ids=["all", "one"])
@torch.no_grad()
def test_at_first_the_model_is_the_base(targets: tuple[str, ...], dtype: torch.dtype) -> None:
    """To the bit; and where adapters are is what was asked for."""
    model = adapted_model(LoRAConfig(8, 16.0, targets), dtype, begun=False)
    assert torch.equal(model(TOKENS), small_model(dtype=dtype)(TOKENS))
    wrapped = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert wrapped == set(targets)
    assert float(adapter_weights(model)["layers.0.self_attn.k_proj.lora_A"].abs().max()) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_dense_formula(tied: bool) -> None:
    """∂B = (alpha / r) ∂W Aᵀ and ∂A = (alpha / r) Bᵀ ∂W, with ∂W of a plain model of the merged weights."""
    model = adapted_model(tie_word_embeddings=tied)
    dense = small_model(dtype=torch.float64, tie_word_embeddings=tied)
    dense.load_state_dict(merged_weights(model))
    targets = TOKENS.roll(-1, 1)
    for one in (model, dense):
        next_token_loss(one.hidden(TOKENS), one.head_weight, targets).backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            wanted = gradients[f"{name}.weight"]
            assert wanted is not None
            assert module.scale == 2.0
            torch.testing.assert_close(module.lora_B.grad, 2.0 * wanted @ module.lora_A.T, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(module.lora_A.grad, 2.0 * module.lora_B.T @ wanted, rtol=1e-9, atol=1e-12)
            seen += 1
    assert seen == 6
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_merged_equals_unmerged(dtype: torch.dtype, tolerance: float) -> None:
    """And is an ordinary model again, all of whose weights can be trained."""
    model = adapted_model(dtype=dtype)
    before = model(TOKENS)
    assert float((before - small_model(dtype=dtype)(TOKENS)).abs().max()) > 0.1
    weights = merged_weights(model)
    merge(model)
    assert not has_adapter(model)
    assert float((model(TOKENS) - before).abs().max()) <= tolerance * float(before.abs().max())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in small_model().state_dict().items()
    }
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_generating_and_saving_know_the_adapters(tmp_path: Path) -> None:
    """Decoding one text, which goes around the modules, and a checkpoint, which has no place for them."""
    model = adapted_model(dtype=torch.float32)
    caches = [KVCache(model.config, 1, 20, torch.device("cpu"), torch.float32) for _ in range(2)]
    for cache in caches:
        model(TOKENS[:1, :5], cache=cache)
    found, wanted = Decoder(model, caches[0], 5).logits(7), model(torch.tensor([[7]]), cache=caches[1])[0, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    save_model(tmp_path / "merged", model)
    assert has_adapter(model)  # as it was
    loaded = load_model(tmp_path / "merged")
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    assert generate(loaded, [[1, 5, 9]], 12) == generate(model, [[1, 5, 9]], 12)


def test_the_optimizer_holds_the_adapters_alone() -> None:
    model = adapted_model()
    optimizer = make_optimizer(model, FINETUNE)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == sum(tensor.numel() for tensor in adapter_weights(model).values())
    sizes = {"q_proj": (24, 24), "v_proj": (24, 12), "down_proj": (40, 24)}
    assert held == 2 * sum(3 * (n + m) for n, m in sizes.values())


def test_dropout_is_for_training() -> None:
    model = adapted_model(LoRAConfig(3, 6.0, LORA_TARGETS, dropout=0.5))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(TOKENS), model(TOKENS))
        model.train()
        assert not torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@torch.no_grad()
def test_dropout_leaves_out_its_share_and_scales_up_the_rest(rate: float) -> None:
    """Of what the adapter reads, and not of what W does. With W, A and B the identity, each number can be seen."""
    n, rows = 64, 500
    linear = torch.nn.Linear(n, n, bias=False)
    adapted = LoRALinear(linear, LoRAConfig(rank=n, alpha=2.0 * n, targets=("q_proj",), dropout=rate))
    for matrix in (adapted.weight, adapted.lora_A, adapted.lora_B):
        torch.nn.init.eye_(matrix)
    torch.manual_seed(0)
    added = adapted.train()(torch.ones(rows, n)) - 1
    left_out = added == 0
    torch.testing.assert_close(added[~left_out], torch.full_like(added[~left_out], 2 / (1 - rate)))
    share, deviation = float(left_out.double().mean()), math.sqrt(rate * (1 - rate) / (rows * n))
    assert abs(share - rate) <= 5 * deviation  # as of so many coins
    assert bool((adapted.eval()(torch.ones(rows, n)) == 3).all())


@torch.no_grad()
def test_dropout_is_of_each_input_by_itself() -> None:
    """Before A, as peft has it: what is left of a sum is not all or nothing."""
    n, rows = 64, 500
    adapted = LoRALinear(torch.nn.Linear(n, n, bias=False), LoRAConfig(1, 1.0, ("q_proj",), dropout=0.5))
    adapted.weight.zero_(), adapted.lora_A.fill_(1.0), adapted.lora_B.fill_(1.0)
    torch.manual_seed(0)
    sums = adapted.train()(torch.ones(rows, n))[:, 0] / 2  # of each row, how many inputs are left
    assert float(sums.mean()) == pytest.approx(32, abs=5 * 4 / math.sqrt(rows))
    assert float(sums.std()) == pytest.approx(4, rel=0.2)  # of 64 coins


def test_the_flags_of_a_run_are_those_of_its_adapters() -> None:
    config = FINETUNE.replace(lora_rank=5, lora_alpha=7.0, lora_dropout=0.3, lora_targets="q_proj, up_proj")
    assert LoRAConfig.of(config) == LoRAConfig(5, 7.0, ("q_proj", "up_proj"), 0.3)
    assert LoRAConfig.of(config.replace(lora_targets="all")).targets == LORA_TARGETS


@torch.no_grad()
def test_first_adapters_are_drawn_as_the_weights_of_a_linear_layer() -> None:
    """A is uniform up to 1 / sqrt(inputs), whatever its rank, as PyTorch draws it; no two matrices are alike."""
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = adapted_model(LoRAConfig(16, 16.0, LORA_TARGETS), torch.float32, begun=False, **shape)
    drawn = adapter_weights(model)
    for name, tensor in drawn.items():
        if name.endswith("lora_B"):
            assert not tensor.any(), name
            continue
        inputs = 256 if "down_proj" in name else 64
        theirs = torch.nn.Linear(inputs, 10_000 // inputs * 16).weight
        assert tensor.shape == (16, inputs)
        assert float(tensor.abs().max()) <= 1 / math.sqrt(inputs)
        for measure in (torch.max, torch.min, torch.std):
            assert float(measure(tensor)) == pytest.approx(float(measure(theirs)), rel=0.06), name
        assert abs(float(tensor.mean())) < 0.1 / math.sqrt(inputs)
    firsts = {tuple(tensor[0, :8].tolist()) for name, tensor in drawn.items() if name.endswith("lora_A")}
    assert len(firsts) == 2 * len(LORA_TARGETS)


@torch.no_grad()
def test_a_held_out_loss_is_without_dropout_and_training_goes_on_with_it() -> None:
    model = adapted_model(LoRAConfig(3, 6.0, LORA_TARGETS, dropout=0.5), torch.float32)
    dense = small_model()
    dense.load_state_dict(merged_weights(model))
    examples = make_examples([3, 9, 1, 5])
    config = FINETUNE.replace(dtype="float32", device="cpu")
    state = start_state(model, PairBatches(examples, 2, pad_id=2, seed=0), config)
    nll = sum(plain_nll(dense, [*one.prompt, *one.answer], len(one.prompt)) for one in examples)
    batches = [collate(examples[:1], 2), collate(examples[1:], 2)]  # of unequal size: no mean of means
    assert validation_loss(state, batches) == pytest.approx(nll / 18, rel=1e-5)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(TOKENS), model(TOKENS))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    pairs = [{"question": f"What is {i}?", "answer": f"It is number {i * 7 % 10}."} for i in range(24)]
    data, test = write_jsonl(folder / "a.jsonl", pairs[:16]), write_jsonl(folder / "b.jsonl", pairs[16:])
    found = ["finetune", "--model", small_checkpoint, "--data", data, "--test", test, "--batch-size", 8]
    found += ["--lr", "0.02", "--schedule", "constant", "--dtype", "float32", "--device", "cpu", "--eval-every", 3]
    found += ["--lora-rank", 4, "--lora-dropout", 0.2, "--lora-targets", "q_proj, up_proj", "--warmup", 0]
    return [str(word) for word in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main([*words, "--out", str(out), "--steps", "12", "--save-every", "4", "--keep", "0"]) == 0
    return out


def test_a_run_changes_its_targets_only(run: Path, small_checkpoint: Path) -> None:
    """`final/` is the base with the adapters in it, and so is `adapter/`, for which the base is named."""
    base, final = load_model(small_checkpoint).state_dict(), load_model(run / "final").state_dict()
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], final[name])}
    assert changed == {"q_proj", "up_proj"}
    assert load_tokenizer(run / "adapter").vocab_size == load_tokenizer(small_checkpoint).vocab_size
    sizes = {file.name: file.stat().st_size for file in (run / "step_000008").iterdir()}
    assert "model.pt" not in sizes  # of the weights a step saves what it changes
    assert sizes["adapter.pt"] + sizes["training.pt"] < (run / "final" / "model.pt").stat().st_size / 2
    pytest.importorskip("safetensors")
    loaded = load_model(run / "adapter").state_dict()
    for name in final:
        torch.testing.assert_close(loaded[name], final[name], rtol=0, atol=0)


@pytest.mark.parametrize("saved", [4, 8, 12])
def test_a_run_that_was_killed_ends_the_same(run: Path, tmp_path: Path, saved: int) -> None:
    """Dropout included; the metrics, too."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for name in ("final", "adapter"):
        shutil.rmtree(out / name)
    for folder in out.glob("step_*"):
        if int(folder.name[5:]) > saved:
            shutil.rmtree(folder)
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    ours, theirs = load_model(out / "final").state_dict(), load_model(run / "final").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, run)
    ]
    assert losses[0] == losses[1]


def test_a_base_that_has_changed_is_noticed(
    run: Path, words: list[str], small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters are for the weights that they were trained beside."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(small_checkpoint, base)
    words = [str(base) if word == str(small_checkpoint) else word for word in words]
    assert main([*words, "--out", str(out), "--steps", "4", "--save-every", "2", "--keep", "0"]) == 0
    shutil.rmtree(out / "final")
    model = load_model(base)
    with torch.no_grad():
        model.embed_tokens.weight[5, 5] += 1e-3
    save_model(base, model, load_tokenizer(base))
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    assert "the model that the run began with has changed" in capsys.readouterr().err


def test_the_best_adapters_are_kept(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*words, "--lr", "1", "--lora-targets", ",".join(LORA_TARGETS)]
    assert main([*words, "--out", str(out), "--steps", "90", "--patience", "1"]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert best < len(records)
    assert main([*words, "--out", str(tmp_path / "short"), "--steps", str(best)]) == 0
    ours, theirs = load_model(out / "final").state_dict(), load_model(tmp_path / "short" / "final").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_adapter_is_passed_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "adapter")
    file = out / "step_000012" / "adapter.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (out / "step_000008" / "adapter.pt").unlink()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "step_000012/adapter.pt: damaged" in shown
    assert "step_000008/adapter.pt: missing" in shown
    assert "continues after step 4 " in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-alpha", "8"], "lora_alpha is given, but no lora_rank"),
        (["--lora-rank", "4", "--lora-targets", "q_proj,lm_head"], "lora_targets has 'lm_head'; choose from q_proj"),
        (["--lora-rank", "4", "--lora-targets", " , "], "lora_targets is empty"),
        (["--lora-rank", "4", "--lora-dropout", "1"], "lora_dropout is 1.0; it must be below 1"),
        (["--lora-rank", "-1"], "lora_rank is -1"),
        (
            ["--lora-rank", "100000"],
            "lora_rank is 100,000; no matrix that gets an adapter has a change of a rank above 192",
        ),
        (["--lora-rank", "65", "--lora-targets", "k_proj"], "above 64,"),
        (["--lora-rank", "4", "--lora-alpha", "0"], "lora_alpha is 0.0"),
    ],
)
def test_wrong_options(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--steps", "1", "--out", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
