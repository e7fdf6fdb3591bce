"""The promise of `evaluation/`: its numbers are what their names say, in whatever batches they were computed.

Scores of words are checked against values worked out by hand, likelihoods against plain loops over all logits and
against `transformers`, and the comparison's two sides against each model evaluated alone.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.data.conversations import read_conversations
from minift.data.stream import DocumentStream
from minift.data.templates import TEMPLATES, template_named
from minift.evaluation import evaluate as module
from minift.evaluation.evaluate import (
    EXTRA_TOKENS,
    Answer,
    Question,
    answer_likelihoods,
    answer_questions,
    compare,
    evaluate,
    exact_match,
    make_questions,
    normalised_match,
    token_f1,
)
from minift.evaluation.likelihood import (
    Likelihood,
    example_likelihoods,
    likelihood_scores,
    page_likelihoods,
    target_scores,
)
from minift.loss import next_token_loss
from minift.model import Llama
from minift.pack import IGNORE, Example, collate
from minift.prompts import Pair
from minift.reference import greedy
from minift.tokenizer.base import Tokenizer
from minift.train import Objective
from tests.helpers import plain_nll, small_model, to_transformers, write_jsonl

PAIRS = [
    Pair("What is the capital of Mexico?", "Mexico City", metric="exact_match"),
    Pair("Name a fruit.", "Apple.", context="It is red."),
    Pair("Tell me how to boil an egg", "1. Put it in water. 2. Boil it for ten minutes.", metric="token_f1"),
    Pair("Q", "\u00e9\u00e8", metric="exact_match"),
    Pair("How many?", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22", metric="token_f1"),
    Pair("What is the official language of the country whose capital is Mexico City?", "Spanish"),
]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Llama:
    return small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, dtype=torch.float64)


@pytest.fixture(scope="module")
def questions(tokenizer: Tokenizer) -> list[Question]:
    return make_questions(PAIRS, TEMPLATES["plain"], tokenizer, 100)[0]


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("Mexico City", "Mexico City", 1.0),
        (" Mexico City\n", "Mexico City", 1.0),
        ("Mexico city", "Mexico City", 0.0),
        ("Mexico City.", "Mexico City", 0.0),
        ("Mexico  City", "Mexico City", 0.0),
        ("", "Mexico City", 0.0),
    ],
)
def test_exact_match(said: str, right: str, score: float) -> None:
    assert exact_match(said, right) == score


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("a b c", "a b c", 1.0),
        ("C b A", "a B c", 1.0),
        ("a b", "a b c d", 2 * 1.0 * 0.5 / 1.5),
        ("a b c d", "a b", 2 * 0.5 * 1.0 / 1.5),
        ("a a a", "a b", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # a repeated word counts once, as in the answer
        ("a a", "a a b", 2 * 1.0 * (2 / 3) / (1 + 2 / 3)),
        ("x y", "a b", 0.0),
        ("", "a b", 0.0),
        ("a,", "a", 0.0),
    ],
)
def test_token_f1(said: str, right: str, score: float) -> None:
    assert token_f1(said, right) == pytest.approx(score, abs=1e-15)


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("mexico city.", "Mexico City", 1.0),
        ("The Mexico  City!", "Mexico City", 1.0),
        ("an apple", "Apple.", 1.0),
        ("theory", "ory", 0.0),
        ("Mexico", "Mexico City", 0.0),
        ("", "the", 1.0),
    ],
)
def test_normalised_match(said: str, right: str, score: float) -> None:
    assert normalised_match(said, right) == score


def test_a_text_has_a_likelihood_and_no_answer(model: Llama, tokenizer: Tokenizer) -> None:
    """Nothing is asked in it, so nothing is generated and no answer is scored."""
    questions, _ = make_questions([Pair("", "A text to learn.")], template_named("text"), tokenizer, 100)
    found = evaluate(model, tokenizer, questions)
    assert found.answers == [Answer("", ended=True)]
    assert [found.to_dict()[name] for name in ("exact_match", "token_f1", "n")] == [None, None, 0]
    ids = tokenizer.encode("A text to learn.", bos=True, eos=True)
    with torch.no_grad():
        assert found.likelihoods[0].nll == pytest.approx(plain_nll(model, ids, 1), rel=1e-12)


# Likelihood -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_score_of_each_target(dtype: torch.dtype, chunk: int) -> None:
    """PyTorch's own cross-entropy of each target, in reading order, and the largest logit; half of these are hit."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator).to(dtype)
    weight = torch.randn(11, 5, generator=generator).to(dtype)
    logits = (hidden @ weight.T).double()  # [3, 7, 11]
    targets = torch.where(torch.rand(3, 7, generator=generator) < 0.5, logits.argmax(-1), torch.randint(11, (3, 7)))
    targets[0, 2:5] = targets[2] = IGNORE
    nll, top1 = target_scores(hidden, weight, targets, chunk)
    keep = targets != IGNORE
    torch.testing.assert_close(
        nll.double(), F.cross_entropy(logits[keep], targets[keep], reduction="none"), rtol=1e-5, atol=1e-5
    )
    assert top1.tolist() == (logits[keep].argmax(-1) == targets[keep]).tolist()
    assert 0 < int(top1.sum()) < len(top1)
    assert float(nll.sum()) == pytest.approx(float(next_token_loss(hidden, weight, targets)), rel=0.02)


@torch.no_grad()
def test_the_likelihood_of_answers_is_that_of_a_plain_loop(model: Llama, questions: list[Question]) -> None:
    each, n_targets, top1 = [], 0, 0
    for question in questions:
        ids, first = question.example.prompt + question.example.answer, len(question.example.prompt)
        each.append(plain_nll(model, ids, first))
        n_targets += len(ids) - first
        guesses = model(torch.tensor([ids]))[0].argmax(-1).tolist()
        top1 += sum(guesses[t - 1] == ids[t] for t in range(first, len(ids)))
    nll = sum(each)
    n_bytes = sum(len(f" {pair.answer}".encode()) for pair in PAIRS)  # the answer's ids hold its space
    for batch_size in (1, 2, 3, 64):
        found = answer_likelihoods(model, questions, batch_size)
        assert [one.nll for one in found] == pytest.approx(each, rel=1e-12)
        assert (sum(one.n_targets for one in found), sum(one.n_bytes for one in found)) == (n_targets, n_bytes)
    scores = likelihood_scores(found)
    assert scores["perplexity"].value == pytest.approx(math.exp(nll / n_targets), rel=1e-12)
    assert scores["bits_per_byte"].value == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-12)
    assert scores["next_token_accuracy"].value == top1 / n_targets


@torch.no_grad()
def test_a_sum_of_many_targets_is_exact() -> None:
    """In float64, whatever the dtype of each: 500 numbers of float32 added up in float32 would lose a digit."""
    model = small_model(max_position_embeddings=512)
    ids = torch.randint(3, 97, (501,), generator=torch.Generator().manual_seed(0)).tolist()
    (found,) = example_likelihoods(model, [Example(ids[:1], ids[1:])])
    hidden = model.hidden(torch.tensor([ids[:-1]]))
    nll, top1 = target_scores(hidden, model.head_weight, torch.tensor([ids[1:]]))
    assert found.nll == pytest.approx(math.fsum(nll.tolist()), rel=1e-12)
    assert (found.n_targets, found.n_top1) == (500, int(top1.sum()))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_likelihood_of_answers_is_that_of_transformers(tokenizer: Tokenizer, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")

    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, tie_word_embeddings=tied)
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("architectures", "model_type")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    weights = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])

    questions, _ = make_questions(PAIRS, TEMPLATES["qa"], tokenizer, 100)
    nll = 0.0
    for question in questions:
        prompt, answer = question.example.prompt, question.example.answer
        labels = torch.tensor([[-100] * len(prompt) + answer])
        nll += float(theirs(input_ids=torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
    for batch_size in (1, 4):
        assert sum(one.nll for one in answer_likelihoods(model, questions, batch_size)) == pytest.approx(nll, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_perplexity_is_that_of_transformers_however_it_is_batched(tokenizer: Tokenizer, packed: bool) -> None:
    """Ours: in rows of any length, padded or packed several to a row. Theirs: one batch, padded on the right."""
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    twin = to_transformers(model)
    questions, _ = make_questions(PAIRS, TEMPLATES["qa"], tokenizer, 100)
    examples = [question.example for question in questions]
    T = max(map(len, examples)) + 1
    ids = torch.tensor([(e.prompt + e.answer + [0] * T)[:T] for e in examples])
    labels = torch.tensor([([IGNORE] * len(e.prompt) + e.answer + [IGNORE] * T)[:T] for e in examples])
    mask = torch.tensor([[float(t <= len(e)) for t in range(T)] for e in examples])
    mean = float(twin(input_ids=ids, attention_mask=mask, labels=labels).loss)  # over all targets of the batch
    for length in (T, T + 13, 200):
        batch = collate(examples, 0, length, pack=packed)
        assert batch.isolated == packed
        nll, n = Objective(model, 7)(batch), batch.n_targets
        assert math.exp(float(nll) / int(n)) == pytest.approx(math.exp(mean), rel=1e-4)
    for batch_size in (1, 2, 5):
        scores = likelihood_scores(answer_likelihoods(model, questions, batch_size))
        assert scores["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-4)


@pytest.mark.parametrize("mean", [800.0, 1e6])
def test_a_hopeless_model_has_a_finite_perplexity(mean: float) -> None:
    assert math.isfinite(likelihood_scores([Likelihood(nll=mean, n_targets=1, n_top1=0)])["perplexity"].value)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 7, 16, 100])
def test_pages_are_scored_window_by_window(model: Llama, tokenizer: Tokenizer, tmp_path: Path, window: int) -> None:
    words = "The capital of Mexico is Mexico City. Its language is Spanish."
    texts = ["Short.", words, words * 3, "\u00e9\u4e2d\U0001f642", *(f"Page {i}." for i in range(20))]
    # One of them fills its windows to the last position, one needs a single position more.
    lengths = {len(tokenizer.encode(text, eos=True)) - 1 for text in texts}
    assert {length % window for length in lengths} >= {0, 1} or window > 7

    nll, n_targets = [], []
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=True)
        n_targets.append(len(ids) - 1)  # every id but BOS is predicted, once
        begins = [(t - 1) // window * window for t in range(1, len(ids))]  # of the window that predicts id t
        nll.append(sum(plain_nll(model, ids[b : t + 1], t - b) for t, b in enumerate(begins, start=1)))
    file = write_jsonl(tmp_path / "pages.jsonl", [{"text": text} for text in texts])
    found = list(page_likelihoods(model, DocumentStream([file], epochs=1), tokenizer, window))
    assert [one.nll for one in found] == pytest.approx(nll, rel=1e-11)
    assert [one.n_targets for one in found] == n_targets
    assert [one.n_bytes for one in found] == [len(text.encode("utf-8")) for text in texts]


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_answers_do_not_depend_on_the_batches(
    model: Llama, tokenizer: Tokenizer, questions: list[Question], batch_size: int
) -> None:
    """Each is what the slow loop gives for its prompt alone, and ends EXTRA_TOKENS after the right answer's length."""
    expected = []
    for question in questions:
        limit = len(question.example.answer) + EXTRA_TOKENS
        room = model.config.max_position_embeddings - len(question.example.prompt)
        ids = greedy(model, question.example.prompt, min(limit, room))
        expected.append(Answer(tokenizer.decode_continuation(ids), ended=len(ids) < min(limit, room)))
    assert answer_questions(model, tokenizer, questions, batch_size) == expected


def prompt_of(tokens: int, tokenizer: Tokenizer) -> str:
    """A question of exactly so many ids, BOS included."""
    for start in ("", "a", "1", "Q?"):
        question = start + " 1" * tokens
        while len(tokenizer.encode(question)) > tokens:
            question = question[:-1]
        if len(tokenizer.encode(question.rstrip())) == tokens:
            return question.rstrip()
    raise AssertionError(f"no question of {tokens} ids")


def test_an_answer_that_the_last_position_cuts_off_has_not_ended(model: Llama, tokenizer: Tokenizer) -> None:
    """Its prompt leaves 2 of the model's 128 positions, and none of the 2 ids is a stop token."""
    questions, skipped = make_questions([Pair(prompt_of(126, tokenizer), "Yes.")], TEMPLATES["plain"], tokenizer, 127)
    assert skipped == 0
    ids = greedy(model, questions[0].example.prompt, 2)
    assert len(ids) == 2
    assert answer_questions(model, tokenizer, questions) == [Answer(tokenizer.decode_continuation(ids), ended=False)]


def test_a_comparison_keeps_the_longest_prompts_that_can_be_answered(tokenizer: Tokenizer) -> None:
    """Of 128 positions a prompt may take 127: it leaves one for the answer."""
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    pairs = [Pair(prompt_of(tokens, tokenizer), "Yes.") for tokens in (126, 127, 128, 129)]
    result = compare((model, tokenizer), (model, tokenizer), pairs, TEMPLATES["plain"])
    assert result["skipped"] == 2
    assert [sample["question"] for sample in result["samples"]] == [pair.question for pair in pairs[:2]]


def test_a_score_counts_the_records_that_ask_for_it(
    model: Llama, tokenizer: Tokenizer, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["Mexico City", "Pear.", "1. Put it in milk.", "wrong", "1 2 3", " Spanish "]
    monkeypatch.setattr(
        module, "answer_questions", lambda *arguments, **options: [Answer(text, ended=True) for text in said]
    )
    found = evaluate(model, tokenizer, questions)
    scores = found.to_dict()
    assert [answer.text for answer in found.answers] == said
    # exact_match: the 2 that name it and the 2 that name nothing; token_f1 the same way.
    assert (scores["n"], scores["n_token_f1"]) == (4, 4)
    assert scores["exact_match"] == (1 + 0 + 0 + 1) / 4
    egg = 2 * (4 / 5) * (4 / 11) / (4 / 5 + 4 / 11)
    numbers = 2 * 1.0 * (3 / 22) / (1.0 + 3 / 22)
    assert scores["token_f1"] == pytest.approx((0 + egg + numbers + 1) / 4, rel=1e-12)
    assert scores["exact_match_normalised"] == 0.5
    names = {"exact_match", "exact_match_normalised", "token_f1", "perplexity", "bits_per_byte", "next_token_accuracy"}
    assert set(scores) == names | {"n", "n_token_f1", "intervals"}
    assert set(scores["intervals"]) == names


@pytest.mark.parametrize(
    ("metric", "other", "n"), [("exact_match", "token_f1", "n"), ("token_f1", "exact_match", "n_token_f1")]
)
def test_a_score_that_fits_no_record_is_none(
    model: Llama, tokenizer: Tokenizer, metric: str, other: str, n: str
) -> None:
    questions, _ = make_questions([Pair("Q", "A", metric=metric)], TEMPLATES["plain"], tokenizer, 100)
    scores = evaluate(model, tokenizer, questions).to_dict()
    assert scores[other] is None
    assert other not in scores["intervals"]
    assert isinstance(scores[metric], float)
    assert scores[n] == 1


def test_an_answer_that_is_cut_counts_the_bytes_that_are_left(tokenizer: Tokenizer) -> None:
    """Bits per byte divide by the text that was scored; in this answer every digit and every space is an id."""
    prompt = tokenizer.encode("How many?")
    (question,), _ = make_questions([PAIRS[4]], TEMPLATES["plain"], tokenizer, len(prompt) + 5)
    text = tokenizer.decode(prompt + question.example.answer).removeprefix("How many?")
    assert " 1 2 3 4 5 6 7 8".startswith(text)
    assert question.n_bytes == len(text) > 2


def test_a_question_that_does_not_fit_is_skipped_and_counted(tokenizer: Tokenizer) -> None:
    long = Pair("word " * 200, "Yes.")
    questions, skipped = make_questions([PAIRS[0], long, PAIRS[1]], TEMPLATES["plain"], tokenizer, 60)
    assert [question.pair for question in questions] == [PAIRS[0], PAIRS[1]]
    assert skipped == 1


# Two models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    """Two models, `before` with the fewer positions, and pairs of which one fits only `after`."""
    folder = tmp_path_factory.mktemp("two models")
    for seed, (name, positions) in enumerate({"before": 64, "after": 128}.items()):
        model = small_model(seed, vocab_size=tokenizer.vocab_size, max_position_embeddings=positions)
        save_model(folder / name, model, tokenizer)
    long = {"question": "word " * 80 + "?", "answer": "Yes."}
    records: list[Any] = [{"question": pair.question, "answer": pair.answer, "metric": pair.metric} for pair in PAIRS]
    write_jsonl(folder / "pairs.jsonl", [*records, long])
    assert 64 < len(tokenizer.encode(long["question"])) < 120
    return {name: folder / name for name in ("before", "after", "pairs.jsonl")}


def test_a_comparison_is_two_evaluations_of_the_same_questions(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    before, after = load_model(files["before"]), load_model(files["after"])
    pairs = read_conversations(files["pairs.jsonl"])
    result = compare((before, tokenizer), (after, tokenizer), pairs, TEMPLATES["plain"])
    assert set(result) == {"before", "after", "difference", "skipped", "samples"}
    assert result["skipped"] == 1
    questions, _ = make_questions(pairs[:-1], TEMPLATES["plain"], tokenizer, 63)
    assert [sample["question"] for sample in result["samples"]] == [pair.question for pair in PAIRS]
    assert [sample["answer"] for sample in result["samples"]] == [pair.answer for pair in PAIRS]
    for name, model in (("before", before), ("after", after)):
        found = evaluate(model, tokenizer, questions)
        assert result[name] == found.to_dict()
        assert {"exact_match", "perplexity", "n"} <= set(result[name])
        assert [sample[name] for sample in result["samples"]] == [answer.text.strip() for answer in found.answers]
        assert [sample[f"{name}_ended"] for sample in result["samples"]] == [answer.ended for answer in found.answers]
    for name, change in result["difference"].items():
        assert change["value"] == result["after"][name] - result["before"][name]
    assert result["before"]["perplexity"] != result["after"]["perplexity"]


def test_compare_writes_and_prints_the_comparison(
    files: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", files["before"], files["after"], "--data", files["pairs.jsonl"], "--device", "cpu"]
    words += ["--json", tmp_path / "x.json", "--show", "2"]
    assert main([str(word) for word in words]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    models = [(load_model(files[name]), tokenizer) for name in ("before", "after")]
    assert written.pop("template") == "plain"
    assert written == compare(*models, read_conversations(files["pairs.jsonl"]), TEMPLATES["plain"])
    shown = capsys.readouterr().out
    assert f"(n = {written['before']['n']})" in shown
    assert f"{written['after']['perplexity']:,.3f}" in shown
    assert [pair.question in shown for pair in PAIRS[:3]] == [True, True, False]
    cut = [not sample[f"{name}_ended"] for sample in written["samples"][:2] for name in ("before", "after")]
    assert any(cut)  # a model with random weights seldom ends
    marked = [line for line in shown.splitlines() if line.startswith(("  before", "  after"))]
    assert [line.endswith("… (cut)") for line in marked] == cut


@pytest.mark.parametrize("name", ["before", "after"])
def test_evaluate_writes_and_prints_the_scores_of_pairs(
    files: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["evaluate", "--model", files[name], "--data", files["pairs.jsonl"], "--json", tmp_path / "x.json"]
    assert main([str(word) for word in words]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    model = load_model(files[name])
    pairs = read_conversations(files["pairs.jsonl"])[: 6 if name == "before" else 7]
    questions, _ = make_questions(pairs, TEMPLATES["plain"], tokenizer, 127)
    expected = evaluate(model, tokenizer, questions).to_dict()
    assert written.pop("skipped") == 7 - len(pairs)
    assert written == expected
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert shown["n"] == [str(expected["n"])]
    low, high = expected["intervals"]["perplexity"]
    assert shown["perplexity"] == [f"{expected['perplexity']:,.3f}", f"[{low:,.3f},", f"{high:,.3f}]"]


@torch.no_grad()
def test_evaluate_recognises_pages(
    files: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["The capital of Mexico is Mexico City.", "Short."]
    pages = write_jsonl(tmp_path / "pages.json.gz", [{"body": text} for text in texts])
    words = ["evaluate", "--model", files["after"], "--data", pages, "--text-field", "body", "--max-length", "50"]
    assert main([str(word) for word in [*words, "--json", tmp_path / "x.json"]]) == 0
    capsys.readouterr()
    model = load_model(files["after"])
    encoded = [tokenizer.encode(text, eos=True) for text in texts]
    assert max(map(len, encoded)) <= 50
    nll = sum(plain_nll(model, ids, 1) for ids in encoded)
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["perplexity"] == pytest.approx(math.exp(nll / sum(len(ids) - 1 for ids in encoded)), rel=1e-5)
    assert written["bits_per_byte"] == pytest.approx(nll / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert written["n"] == len(written["intervals"]["perplexity"]) == 2


def test_a_file_of_pairs_is_scored_as_pairs_even_if_it_also_has_texts(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alpaca's own file has the complete prompt under `text`, in addition to its parts."""
    record = {"instruction": "Name a fruit.", "input": "", "output": "Apple.", "text": "Name a fruit. Apple."}
    file = write_jsonl(tmp_path / "alpaca.jsonl", [record])
    assert main(["evaluate", "--model", str(files["before"]), "--data", str(file)]) == 0
    assert "exact_match" in capsys.readouterr().out
