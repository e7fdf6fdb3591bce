"""The promise of `minift explain`: its numbers are those of a training step, and of the textbook's formulas."""

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minift.config import FINETUNE, TrainConfig
from minift.data.batches import PairBatches
from minift.data.templates import template_named
from minift.look.explain import Entry, Position, XRay, explain
from minift.look.pages.xray import xray_page
from minift.look.report import visible, xray_table
from minift.model import Llama
from minift.pack import IGNORE, PADDING, Example, collate
from minift.prompts import Pair
from minift.runs.start import start_state
from minift.tokenizer.base import Tokenizer
from minift.train import train_step
from tests.helpers import encode_pair, small_model, write_jsonl

Run = Callable[..., subprocess.CompletedProcess[str]]
PAIRS = [
    Pair("What is the capital of Mexico?", "Mexico City"),
    Pair("Tell me how to boil an egg", "1. Boil water. 2. Put the egg in."),
    Pair("What is 2 + 2?", "4"),
    Pair("Who?", "É 🦙 \0 <b>"),
]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Llama:
    """A random model with the bundled vocabulary."""
    return small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, std=0.3)


def examples_of(tokenizer: Tokenizer, pairs: list[Pair]) -> list[Example]:
    encoded = [
        encode_pair(pair, template_named("plain" if pair.question else "text"), tokenizer, 128) for pair in pairs
    ]
    return [example for example in encoded if example is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], [Pair("", "A page. It has two sentences.")]], ids=len)
def test_the_sum_is_the_loss_of_a_training_step(
    pairs: list[Pair], pack: bool, chunk: int, dtype: str, tokenizer: Tokenizer
) -> None:
    """Bitwise: against what train_step reports for this batch, and as the column adds up."""
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, std=0.3)
    examples = examples_of(tokenizer, pairs)
    config = FINETUNE.replace(dtype=dtype, device="cpu", loss_chunk=chunk, compile=False)
    xray = explain(model, tokenizer, examples, config, pack)
    batch = collate(examples, tokenizer.eos_id, pack=pack)
    state = start_state(model, PairBatches(examples, 4, tokenizer.eos_id, 0), config)
    assert xray.loss == train_step(state, [batch], 1e-3, config).loss
    column = torch.tensor([at.nll for at in xray.positions if at.learned])
    assert float(column.sum()) / len(column) == xray.loss
    assert xray.n_targets == len(column) == batch.n_targets
    assert xray.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_plain_xray_has_the_same_numbers(dtype: str, tolerance: float, model: Llama, tokenizer: Tokenizer) -> None:
    examples, config = examples_of(tokenizer, PAIRS), TrainConfig(dtype=dtype, device="cpu")
    fast, plain = (explain(model, tokenizer, examples, config, plain=plain) for plain in (False, True))
    assert plain.loss == pytest.approx(fast.loss, rel=tolerance)
    for ours, theirs in zip(plain.positions, fast.positions, strict=True):
        assert (ours.token, ours.next, ours.learned) == (theirs.token, theirs.next, theirs.learned)
        assert ours.nll == pytest.approx(theirs.nll, rel=tolerance, abs=tolerance)


def test_every_number_is_the_textbooks(model: Llama, tokenizer: Tokenizer) -> None:
    """Each pair alone, through plain logits in float64: softmax, rank, and autograd's gradient at the logits."""
    exact = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, std=0.3).double()
    examples = examples_of(tokenizer, PAIRS)
    xray = explain(model, tokenizer, examples, TrainConfig(dtype="float32", device="cpu"))
    by_tokens = {tuple(e.prompt + e.answer): e for e in examples}
    documents: dict[tuple[int, int], list] = {}
    for at in xray.positions:
        documents.setdefault((at.row, at.document), []).append(at)
    assert len(documents) == len(examples)
    for positions in documents.values():
        ids = [positions[0].token, *(at.next for at in positions)]
        example = by_tokens.pop(tuple(ids))
        assert [at.token for at in positions] == ids[:-1]
        assert [at.position for at in positions] == list(range(len(positions)))
        assert [at.learned for at in positions] == [i >= len(example.prompt) - 1 for i in range(len(positions))]
        logits = exact(torch.tensor([ids[:-1]]))[0].detach().requires_grad_()  # [T, V]
        targets = torch.tensor([at.next if at.learned else IGNORE for at in positions])
        F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE).backward()
        assert logits.grad is not None
        probabilities = logits.detach().softmax(-1)
        for at, p, gradient in zip(positions, probabilities, logits.grad, strict=True):
            assert at.probability == pytest.approx(float(p[at.next]), rel=1e-4)
            assert at.nll == pytest.approx(-math.log(p[at.next]), abs=1e-4)
            assert at.rank == 1 + int((p > p[at.next]).sum())
            largest = p.topk(5)
            assert [entry.id for entry in at.likeliest] == largest.indices.tolist()
            assert [entry.value for entry in at.likeliest] == pytest.approx(largest.values.tolist(), abs=1e-6)
            if at.learned:
                assert len(at.gradient) == 5
                assert {e.id for e in at.gradient} == set(gradient.abs().topk(5).indices.tolist())
                assert [e.value for e in at.gradient] == pytest.approx(
                    [float(gradient[e.id]) for e in at.gradient], abs=1e-6
                )
            else:
                assert not at.gradient
                assert not gradient.any()  # a given position pulls on nothing
    assert not by_tokens


def test_padding_is_left_out_and_documents_are_told_apart(model: Llama, tokenizer: Tokenizer) -> None:
    examples = examples_of(tokenizer, PAIRS)
    batch = collate(examples, tokenizer.eos_id)
    xray = explain(model, tokenizer, examples, TrainConfig(dtype="float32", device="cpu"))
    places = (batch.document_ids != PADDING).nonzero().tolist()
    assert [[at.row, at.place] for at in xray.positions] == places
    assert [at.document for at in xray.positions] == [int(batch.document_ids[row, place]) for row, place in places]
    assert max(at.document for at in xray.positions) > 0  # several documents in a row


def test_texts_are_what_an_id_adds(model: Llama, tokenizer: Tokenizer) -> None:
    xray = explain(model, tokenizer, examples_of(tokenizer, PAIRS), TrainConfig(dtype="float32", device="cpu"))
    learned = [at.next for at in xray.positions if at.learned and (at.row, at.document) == (0, 0)]
    example = examples_of(tokenizer, PAIRS[1:2])[0]  # the longest comes first
    assert learned == example.answer
    assert "".join(xray.texts[id] for id in learned[:-1]) == " 1. Boil water. 2. Put the egg in."
    assert xray.texts[tokenizer.eos_id] == "</s>"
    assert xray.texts[tokenizer.encode_continuation("🦙")[0]] == "<0xF0>"  # a quarter of a character
    assert json.loads(json.dumps(xray.to_dict()))["texts"]["1"] == "<s>"


def test_an_id_without_a_piece_has_its_number(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size + 300, max_position_embeddings=128, std=0.5)
    xray = explain(model, tokenizer, examples_of(tokenizer, PAIRS), TrainConfig(dtype="float32", device="cpu"))
    spare = [id for id in xray.texts if id >= tokenizer.vocab_size]
    assert spare
    assert all(xray.texts[id] == f"<{id}>" for id in spare)


def test_visible() -> None:
    assert visible(" a\n\0\x1b\u202e🦙") == "▁a⏎\\x00\\x1b\\u202e🦙"


def test_the_table(model: Llama, tokenizer: Tokenizer) -> None:
    config = TrainConfig(dtype="float32", device="cpu")
    one = explain(model, tokenizer, examples_of(tokenizer, PAIRS[:1]), config)
    text = xray_table({"random": one})
    rows = [line.split() for line in text.splitlines()[1:] if line[:5].strip().isdigit()]
    assert [row[3] for row in rows] == ["0"] * 7 + ["1"] * 3
    assert [row[1:3] for row in rows][-3:] == [["?", "▁Mexico"], ["▁Mexico", "▁City"], ["▁City", "</s>"]]
    for row, at in zip(rows, one.positions, strict=True):
        assert float(row[4]) == pytest.approx(at.probability, abs=5e-5)
        assert (int(row[5].replace(",", "")), float(row[6])) == (at.rank, pytest.approx(at.nll, abs=6e-4))
    assert f"loss {one.loss:.6f} nats, the mean nll of 3 targets" in text
    assert text.count("gradient  ") == 3  # in lines of their own …
    assert "gradient  " not in xray_table({"random": one}, width=250)  # … where there is no room
    assert "\x1b[" not in text
    assert xray_table({"random": one}, colour=True).count("\x1b[2m") == 7  # what is given is faint
    several = explain(model, tokenizer, examples_of(tokenizer, PAIRS), config)
    assert xray_table({"random": several}).count("positions from 0; sees no other document") == 4


def test_two_models_side_by_side(model: Llama, tokenizer: Tokenizer) -> None:
    config, examples = TrainConfig(dtype="float32", device="cpu"), examples_of(tokenizer, PAIRS[:1])
    other = small_model(seed=1, vocab_size=tokenizer.vocab_size, max_position_embeddings=128, std=0.3)
    xrays = {"one": explain(model, tokenizer, examples, config), "other": explain(other, tokenizer, examples, config)}
    rows = [line.split() for line in xray_table(xrays).splitlines()[2:12]]
    for row, at, and_other in zip(rows, xrays["one"].positions, xrays["other"].positions, strict=True):
        assert [float(row[6]), float(row[10])] == pytest.approx([at.nll, and_other.nll], abs=6e-4)
    # A model that cuts the text differently: below each other, with nothing paired.
    cut = XRay(xrays["other"].positions[1:], 1.0, 3, "float32", xrays["other"].texts)
    assert xray_table({"one": xrays["one"], "cut": cut}).count("likeliest\n") == 2


def xray_of(probabilities: list[float]) -> XRay:
    """An X-ray with these probabilities of the next token, all of them learned."""
    at = [
        Position(0, i, 0, i, 1, 2, True, -math.log(p), 1, (Entry(2, p),), (Entry(2, p - 1), Entry(1, 1 - p)))
        for i, p in enumerate(probabilities)
    ]
    return XRay(at, 1.0, len(at), "float32", {1: " a", 2: " b"})


def test_the_colour_of_a_token_is_its_surprise() -> None:
    """On the page by the bounds of its key; in a terminal by three."""
    bounds = [0.5, 0.2, 0.05, 0.01, 0.001]
    probabilities = [p for bound in bounds for p in (bound * 1.01, bound * 0.99)]
    page = xray_page({"made up": xray_of(probabilities)})
    levels = [int(level) for level in re.findall(r'class="t s(\d) learned"', page)]
    assert levels == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    words = [f"{bound:g} or more" for bound in bounds] + ["less"]
    assert re.findall(r'<span class="s(\d)">([^<]+)</span>', page) == [(str(i), word) for i, word in enumerate(words)]
    lines = xray_table({"made up": xray_of(probabilities)}, colour=True, width=250).splitlines()
    colours = [line[2:4] for line in lines if line.startswith("\x1b[")]
    assert colours == ["32", *["33"] * 4, *["31"] * 5]


def test_a_gradient_has_its_sign_in_the_table() -> None:
    text = xray_table({"made up": xray_of([0.25])}, width=250)
    assert "▁b -.75  ▁a +.75" in text
    assert "▁b .25" in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(minift: Run, small_checkpoint: Path, tmp_path: Path) -> None:
    words = ["explain", "What is the capital of Mexico?", "--model", small_checkpoint, "--device", "cpu"]
    page = minift(*words, "--json", tmp_path / "page.json")
    assert page.returncode == 0, page.stderr
    pair = minift(*words, "--answer", "Mexico City", "--json", tmp_path / "pair.json")
    assert pair.returncode == 0, pair.stderr
    (of_page,) = json.loads((tmp_path / "page.json").read_text())["models"].values()
    (of_pair,) = json.loads((tmp_path / "pair.json").read_text())["models"].values()
    assert all(at["learned"] for at in of_page["positions"])
    assert [at["learned"] for at in of_pair["positions"]] == [False] * 7 + [True] * 3
    # The question is read alike in both; what follows it is not.
    for at, other in zip(of_page["positions"][:7], of_pair["positions"][:7], strict=True):
        assert (at["token"], at["next"], at["rank"]) == (other["token"], other["next"], other["rank"])
        assert at["nll"] == pytest.approx(other["nll"], abs=1e-5)
    assert f"loss {of_pair['loss']:.6f} nats" in pair.stdout
    assert "\x1b[" not in pair.stdout  # not a terminal


def test_records_of_a_file(minift: Run, small_checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"question": p.question, "answer": p.answer} for p in PAIRS])
    words = ["explain", "--model", small_checkpoint, "--data", data, "--device", "cpu", "--colour", "always"]
    result = minift(*words, "-n", "2", "--skip", "1", "--template", "qa")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sees no other document") == 2
    assert "\x1b[2m" in result.stdout
    assert "Mexico" not in result.stdout


def test_a_text_that_is_too_long_is_cut_and_said_so(minift: Run, small_checkpoint: Path) -> None:
    result = minift("explain", "word " * 600, "--model", small_checkpoint, "--device", "cpu")
    assert result.returncode == 0
    assert "note: cut to the 512 positions" in result.stderr
    assert "mean nll of 512 targets" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a TEXT, or --data"),
        (["a", "--data", "x.jsonl"], "give a TEXT, or --data"),
        ([" \n"], "TEXT is blank"),
        (["a", "--answer", " "], "--answer is blank"),
        (["--answer", "a", "--data", "x.jsonl"], "--answer belongs to a TEXT"),
        (["a", "--colour", "blue"], "--colour is 'blue'; choose from auto, always, never"),
        (["a", "--template", "qa"], "could be put into the template qa"),
        (["a", "--dtype", "int8"], "dtype"),
        (["a", "--dtype", "float16", "--device", "cpu"], "float16 arithmetic on a CPU"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "{data}", "-n", "0"], "n is 0; it must be at least 1"),
        (["--data", "{data}", "--skip", "-1"], "skip is -1; it must be at least 0"),
        (["--data", "{data}", "--skip", "4"], "has no more than 4 records"),
        (["a", "--against", "{model}"], "--against is the same model"),
        (["a", "--against", "nowhere"], "nowhere"),
        (["a", "--html", "nowhere/x.html"], "nowhere/x.html: cannot be written"),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else "",
)
def test_wrong_input(
    words: list[str], message: str, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minift.cli import main

    data = write_jsonl(tmp_path / "x.jsonl", [{"question": p.question, "answer": p.answer} for p in PAIRS])
    filled = [word.format(data=data, model=small_checkpoint) for word in words]
    assert main(["explain", "--model", str(small_checkpoint), *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
