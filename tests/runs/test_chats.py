"""The promise about chats, from a file to a model that talks: the whole chain, on an instruct model made here.

The bundled base gets ChatML's two tokens and a chat template, and learns conversations. Its answers must then stop at
the token that ends a turn, and another program (`transformers`) must see the same ids and give the same answers.
"""

import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from minift.checkpoint import load_model
from minift.cli import main
from minift.data.conversations import read_all_conversations
from minift.data.templates import choose_template, template_named
from minift.errors import InputError
from minift.evaluation.evaluate import answer_questions, make_questions
from minift.generate import generate
from minift.pack import encode_conversation, encode_prompt
from minift.prompts import Chat, Pair, Turn
from minift.runner import BasicModelRunner
from minift.storage.names import bundled
from minift.tokenizer.load import load_tokenizer
from tests.helpers import CHATML, bits, instruct_model, write_jsonl

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

FLAGS = ["--epochs", "6", "--lr", "1e-3", "--dtype", "float32", "--device", "cpu", "--save-every", "20", "--keep", "0"]
HELD_OUT = 20


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations() -> list[dict[str, Any]]:
    """Return chats of two questions each about one country, of the bundled pairs; some have a system text."""
    rows = [json.loads(line) for line in bundled("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    draw.shuffle(rows)
    chats = []
    for first, second in zip(rows[:400:2], rows[1:400:2], strict=True):
        system = [message("system", "Answer in few words.")] * (len(chats) % 4 == 0)
        turns = [(row["question"], row["answer"]) for row in (first, second)]
        said = [message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        chats.append({"messages": [*system, *said]})
    return chats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the model, the data, and a run on them."""
    folder = tmp_path_factory.mktemp("chats")
    instruct_model(folder / "model")
    chats = conversations()
    write_jsonl(folder / "chats.jsonl", chats[HELD_OUT:])
    write_jsonl(folder / "test.jsonl", chats[:HELD_OUT])
    data = ["--data", str(folder / "chats.jsonl"), "--test", str(folder / "test.jsonl")]
    words = ["finetune", "--model", str(folder / "model"), *data, "--out", str(folder / "run"), *FLAGS]
    assert main([*words, "--save-format", "hf"]) == 0
    return folder


def test_the_run_is_on_chats_in_the_models_own_template(folder: Path) -> None:
    result = json.loads((folder / "run" / "compare.json").read_text(encoding="utf-8"))
    assert result["template"] == "chat"
    chats = conversations()[:HELD_OUT]
    assert [(one["question"], one["answer"]) for one in result["samples"]] == [
        (chat["messages"][-2]["content"], chat["messages"][-1]["content"]) for chat in chats
    ]
    assert result["before"]["n"] == result["after"]["n"] == HELD_OUT
    assert result["after"]["perplexity"] < result["before"]["perplexity"] / 3
    saved = (folder / "run" / "final" / "chat_template.jinja").read_bytes()
    assert saved == (folder / "model" / "chat_template.jinja").read_bytes()


def test_answers_stop_at_the_token_that_ends_a_turn(folder: Path) -> None:
    """That of the model before training runs on: nothing has taught it to stop there."""
    ended = {}
    for name in ("model", "run/final"):
        model, tokenizer = load_model(folder / name), load_tokenizer(folder / name)
        template = template_named("chat", tokenizer)
        questions, _ = make_questions(read_all_conversations([folder / "test.jsonl"]), template, tokenizer, 500)
        answers = answer_questions(model, tokenizer, questions)
        ended[name] = sum(answer.ended for answer in answers)
        assert not any("<|im_" in answer.text for answer in answers if name != "model")
    assert ended["run/final"] >= 0.9 * HELD_OUT
    stop = load_tokenizer(folder / "model").encode("<|im_end|>", bos=False)
    assert set(stop) <= set(load_model(folder / "run" / "final").config.eos_token_ids)


def test_other_programs_see_the_same_ids_and_answer_the_same(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    final = folder / "run" / "final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, local_files_only=True).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(final, local_files_only=True)
    ours, tokenizer = load_model(final), load_tokenizer(final)
    template = template_named("chat", tokenizer)
    for record in conversations()[:6]:
        messages = record["messages"][:-1]
        asked = Chat((*(Turn(m["role"], m["content"]) for m in messages), Turn("assistant", "", learned=True)))
        prompt = encode_prompt(template.prompt(asked), tokenizer)
        given = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert given["input_ids"] == prompt
        (answer,) = generate(ours, [prompt], 24)
        out = theirs.generate(
            **given.convert_to_tensors("pt", prepend_batch_axis=True), max_new_tokens=24, do_sample=False
        )
        made = out[0, len(prompt) :].tolist()
        stops = set(ours.config.eos_token_ids)
        assert answer == [id for id in made if id not in stops]


@pytest.mark.slow
def test_a_run_on_chats_that_is_resumed_is_the_same_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole, out = folder / "run", tmp_path / "run"
    shutil.copytree(whole / "step_000020", out / "step_000020")
    shutil.copy(whole / "config.json", out)
    (out / "metrics.jsonl").write_text("".join((whole / "metrics.jsonl").read_text().splitlines(keepends=True)[:20]))
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    before, after = (bits(load_model(run / "final")) for run in (whole, out))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    results = [json.loads((run / "compare.json").read_text(encoding="utf-8")) for run in (whole, out)]
    assert results[0] == results[1]


def test_all_commands_ask_through_the_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, test = str(folder / "run" / "final"), str(folder / "test.jsonl")
    samples = json.loads((folder / "run" / "compare.json").read_text(encoding="utf-8"))
    assert main(["compare", str(folder / "model"), final, "--data", test, "--json", str(tmp_path / "c.json")]) == 0
    compared = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert compared["samples"] == samples["samples"]
    assert main(["evaluate", "--model", final, "--data", test, "--json", str(tmp_path / "e.json")]) == 0
    scores = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert {name: scores[name] for name in samples["after"]} == samples["after"]
    assert main(["explain", "--data", test, "--model", final, "--json", str(tmp_path / "x.json")]) == 0
    xray = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["models"][final]
    texts = [xray["texts"][str(position["next"])] for position in xray["positions"] if position["learned"]]
    answers = [m["content"] for m in conversations()[0]["messages"] if m["role"] == "assistant"]
    assert "".join(texts).replace("▁", " ").split("<|im_end|>")[:-1] != []
    for answer in answers:
        assert answer.split()[0] in "".join(texts).replace("▁", " ")
    capsys.readouterr()
    question = conversations()[0]["messages"][-2]["content"]
    assert main(["generate", "--model", final, "--template", "chat", "--prompt", question]) == 0
    printed = capsys.readouterr().out.strip()
    runner = BasicModelRunner(final, prompt_template="chat", device="cpu")
    assert runner(question, max_tokens=64) == printed


def test_a_conversation_in_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second answer is given after all that was said; /clear forgets it."""
    final = folder / "run" / "final"
    model, tokenizer = load_model(final), load_tokenizer(final)
    template = template_named("chat", tokenizer)

    def answer(*said: str) -> str:
        turns = [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(said)]
        chat = Chat((Turn("system", "Be brief."), *turns, Turn("assistant", "", learned=True)))
        (ids,) = generate(model, [encode_prompt(template.prompt(chat), tokenizer)], 16)
        return tokenizer.decode_continuation(ids)

    first, second = (row["messages"][-2]["content"] for row in conversations()[1:3])
    one = answer(first)
    two, alone = answer(first, one, second), answer(second)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\n\n{second}\n/clear\n{second}\n/exit\nnever asked\n"))
    words = ["chat", "--model", str(final), "--system", "Be brief.", "--max-new-tokens", "16", "--device", "cpu"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{one.strip()}\n{two.strip()}\n{alone.strip()}\n"


def test_a_conversation_that_no_longer_fits_forgets_its_beginning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"Say {'word ' * 60}{number}." for number in range(8)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(folder / "model"), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert "no longer fit and are forgotten" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 600))
    assert main(["chat", "--model", str(folder / "model"), "--device", "cpu"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model has 512 positions" in line  # and the conversation goes on


def test_a_template_of_the_users_own_travels_with_the_model(folder: Path, tmp_path: Path) -> None:
    own = (folder / "model" / "chat_template.jinja").read_text(encoding="utf-8").replace("'user'", "'user'")
    (tmp_path / "mine.jinja").write_text("{#- mine -#}" + own, encoding="utf-8")
    words = ["finetune", "--model", str(folder / "model"), "--data", str(folder / "test.jsonl"), "--steps", "1"]
    template = str(tmp_path / "mine.jinja")
    assert main([*words, "--out", str(tmp_path / "run"), "--template", template, "--device", "cpu"]) == 0
    saved = tmp_path / "run" / "final" / "chat_template.jinja"
    assert saved.read_bytes() == (tmp_path / "mine.jinja").read_bytes()


def test_a_text_that_is_rendered_already_has_the_ids_of_the_chat(folder: Path, tmp_path: Path) -> None:
    """With `rendered` its markers are markers, and nothing is added to them but what is missing."""
    tokenizer = load_tokenizer(folder / "model")
    (record, *_) = conversations()
    chat = read_all_conversations([write_jsonl(tmp_path / "chat.jsonl", [record])])[0]
    (spans,) = template_named("chat", tokenizer).examples(chat)
    text = Pair("", "".join(span.text for span in spans))
    whole = encode_prompt(spans, tokenizer)
    for rendered in (True, False):
        (example,) = encode_conversation(text, template_named("text", tokenizer, rendered), tokenizer, 500)
        assert example is not None
        ids = example.prompt + example.answer
        stop = tokenizer.encode("<|im_end|>", bos=False)[0]
        assert ids.count(stop) == (whole.count(stop) if rendered else 0)
        assert (ids == whole) == rendered
        assert ((ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)) != rendered
    ended = Pair("", "A text.</s>\n")
    (example,) = encode_conversation(ended, template_named("text", tokenizer, rendered=True), tokenizer, 500)
    assert example is not None
    assert (example.prompt + example.answer).count(tokenizer.eos_id) == 1


@pytest.mark.parametrize("as_text", [False, True])
def test_what_format_writes_in_the_chat_template_trains_the_same_ids(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_text: bool
) -> None:
    """With the words that the command prints, nothing is added to the ids of the chat."""
    tokenizer, model = load_tokenizer(folder / "model"), str(folder / "model")
    source, out = (
        write_jsonl(tmp_path / "x.jsonl", [{"messages": conversations()[1]["messages"][:2]}]),
        tmp_path / "out.jsonl",
    )
    words = ["data", "format", str(source), "--tokenizer", model, "--template", "chat", "--out", str(out)]
    assert main([*words, *["--as-text"] * as_text]) == 0
    hint = capsys.readouterr().out.strip().removesuffix(")").split("train on it with ")[1]
    assert hint == ("--rendered" if as_text else "--template joined --rendered")
    (chat,), (text,) = read_all_conversations([source]), read_all_conversations([out])
    (expected,) = encode_conversation(chat, template_named("chat", tokenizer), tokenizer, 500)
    for name in ("auto", *["joined"] * (not as_text)):
        chosen = choose_template(name, [text], tokenizer, rendered=True)
        (found,) = encode_conversation(text, template_named(chosen, tokenizer, rendered=True), tokenizer, 500)
        assert expected is not None
        assert found is not None
        assert found.prompt + found.answer == expected.prompt + expected.answer
        assert as_text or found.prompt == expected.prompt
    with pytest.raises(InputError, match=r"(--rendered says that the data are written in a template|asks nothing)"):
        choose_template("chat", [text], tokenizer, rendered=True)


def test_a_conversation_that_the_template_refuses_costs_one_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    template = tmp_path / "strict.jinja"
    template.write_text(strict + "{% endfor %}" + CHATML, encoding="utf-8")
    plain = [{"messages": chat["messages"][-2:]} for chat in conversations() if len(chat["messages"]) == 4]
    file = write_jsonl(tmp_path / "x.jsonl", [*plain, conversations()[0]])
    assert len(plain) > 100
    words = ["--model", str(folder / "model"), "--data", str(file), "--template", str(template), "--device", "cpu"]
    assert main(["finetune", *words, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert f"1 of {len(plain) + 1} records skipped" in printed
    assert "the chat template refuses this conversation: no system text" in printed
    write_jsonl(file, [plain[0], conversations()[0]] * 3)
    assert main(["finetune", *words, "--steps", "1", "--out", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no system text" in line


def test_adapters_alone_stop_where_a_turn_ends(folder: Path, tmp_path: Path) -> None:
    """The adapter's folder has no list of stop tokens; the template says where a turn ends."""
    words = ["finetune", "--model", str(folder / "model"), "--data", str(folder / "chats.jsonl"), "--device", "cpu"]
    test = ["--test", str(folder / "test.jsonl"), "--lora-rank", "8", "--lr", "5e-3", "--steps", "30"]
    assert main([*words, *test, "--dtype", "float32", "--out", str(tmp_path / "run")]) == 0
    scores = {}
    for name in ("final", "adapter"):
        file = tmp_path / f"{name}.json"
        model = ["--model", str(tmp_path / "run" / name), "--device", "cpu"]
        assert main(["evaluate", *model, "--data", str(folder / "test.jsonl"), "--json", str(file)]) == 0
        scores[name] = json.loads(file.read_text(encoding="utf-8"))
    assert scores["final"]["token_f1"] == pytest.approx(scores["adapter"]["token_f1"])


def test_a_command_of_the_terminal_is_not_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n /CLEAR\n/exit\r\nnever asked\n"))
    assert main(["chat", "--model", str(folder / "model"), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "note: unknown command /help; known: /clear, /exit\n"


def test_the_runner_takes_chats_and_asks_in_the_models_template(folder: Path) -> None:
    runner = BasicModelRunner(folder / "model", device="cpu", system_prompt="Be brief.")
    runner.load_data_from_jsonlines(folder / "test.jsonl")
    runner.train(steps=1, dtype="float32")
    result = runner.evaluate()
    assert len(result["eval_results"]) == 2
    prompt = "".join(span.text for span in runner._prompt("What is the capital of Malta?"))
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is")
