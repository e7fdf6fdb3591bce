"""The promise of `pack.py` about chats: what is learned of a conversation is its answers, each to its end, and no more.

The slow twin of a chat is the list of its answers, each an example of its own after all that was said before. The sum
of their losses and gradients must be that of the chat in one row, and of any packing.
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from minift.data.examples import encode_conversations
from minift.data.templates import TEMPLATES, choose_template
from minift.errors import InputError
from minift.model import Llama
from minift.pack import IGNORE, Example, collate, encode_conversation, encode_prompt, encode_spans
from minift.prompts import Chat, Pair, Span, Turn
from minift.tokenizer.base import Tokenizer
from minift.train import Objective
from tests.helpers import encode_pair, small_model

ANSWERS = ("Apple.", "Pear and plum.", " Fig.\n")


def chat(count: int = 3, system: str = "", not_learned: tuple[int, ...] = ()) -> Chat:
    turns = [Turn("system", system)] if system else []
    for place in range(count):
        turns += [
            Turn("user", f"Name fruit {place}."),
            Turn("assistant", ANSWERS[place % 3], learned=place not in not_learned),
        ]
    return Chat(tuple(turns), where="x.jsonl:1")


def encoded(conversation: Chat, tokenizer: Tokenizer, max_length: int = 500, learn: str = "all") -> Example:
    (example,) = encode_conversation(conversation, TEMPLATES["qa"], tokenizer, max_length, learn)
    assert example is not None
    return example


def learned_texts(example: Example, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the stretches that are targets, from a batch of this example alone."""
    batch = collate([example], tokenizer.eos_id)
    texts, ids = [], list[int]()
    for target in [*batch.targets[0].tolist(), IGNORE]:
        if target != IGNORE:
            ids.append(target)
        elif ids:
            assert ids[-1] == tokenizer.eos_id or example.cut
            texts.append(tokenizer.decode_continuation(ids))
            ids = []
    return texts


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_every_answer_is_learned_and_nothing_else(tokenizer: Tokenizer, count: int, system: str) -> None:
    example = encoded(chat(count, system), tokenizer)
    assert learned_texts(example, tokenizer) == ["\n" + ANSWERS[place % 3] for place in range(count)]
    assert example.n_targets == collate([example], 0).n_targets


def test_only_the_last_answer_or_those_of_weight_one(tokenizer: Tokenizer) -> None:
    assert learned_texts(encoded(chat(), tokenizer, learn="last"), tokenizer) == ["\n" + ANSWERS[2]]
    assert learned_texts(encoded(chat(not_learned=(1,)), tokenizer), tokenizer) == ["\nApple.", "\n Fig.\n"]
    last = encoded(chat(not_learned=(2,)), tokenizer, learn="last")
    assert learned_texts(last, tokenizer) == ["\nPear and plum."]
    assert encode_conversation(chat(not_learned=(0, 1, 2)), TEMPLATES["qa"], tokenizer, 500) == [None]


def test_a_chat_of_one_answer_is_the_pair(tokenizer: Tokenizer) -> None:
    for name, template in TEMPLATES.items():
        pair = Pair("Name fruit 0.", "Apple.", system="Be brief.")
        assert encoded_with(name, chat(1, "Be brief."), tokenizer) == encode_pair(pair, template, tokenizer, 500)


def encoded_with(name: str, conversation: Chat, tokenizer: Tokenizer) -> Example | None:
    (example,) = encode_conversation(conversation, TEMPLATES[name], tokenizer, 500)
    return example


def test_what_is_asked_in_use_is_what_came_before_in_training(tokenizer: Tokenizer) -> None:
    for place in range(3):
        turns = chat().turns[: 2 * place + 2]
        example = encoded(Chat(turns), tokenizer, learn="last")
        assert encode_prompt(TEMPLATES["qa"].prompt(Chat(turns)), tokenizer) == example.prompt


def test_a_chat_that_does_not_fit_keeps_as_much_as_fits(tokenizer: Tokenizer) -> None:
    whole = encoded(chat(), tokenizer)
    ids = whole.prompt + whole.answer
    targets = collate([whole], 0).targets[0].tolist()
    for limit in range(2, len(whole) + 2):
        (cut,) = encode_conversation(chat(), TEMPLATES["qa"], tokenizer, limit)
        expected = targets[:limit]
        if all(target == IGNORE for target in expected):
            assert cut is None
            continue
        assert cut is not None
        assert cut.prompt + cut.answer == ids[: len(cut) + 1]
        assert collate([cut], 0).targets[0].tolist()[: len(cut)] == expected[: len(cut)]
        assert all(target == IGNORE for target in expected[len(cut) :])  # what is only given at its end is left out
        assert cut.cut == (len([t for t in targets if t != IGNORE]) > cut.n_targets)


def sums(examples: list[Example], pack: bool, length: int | None = None) -> tuple[float, torch.Tensor]:
    """Return the summed loss of a batch in float64, and the gradient of all weights."""
    model: Llama = small_model(vocab_size=2048, max_position_embeddings=512).double()
    loss = Objective(model, 64)(collate(examples, 0, length, pack))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_chat_in_one_row_is_its_answers_one_by_one_and_packed(tokenizer: Tokenizer) -> None:
    chats = [chat(3), chat(1, "Be brief."), chat(2, not_learned=(0,))]
    examples, dropped = encode_conversations(chats, TEMPLATES["llama2"], tokenizer, 500)
    assert dropped == 0
    one_by_one = []
    for conversation in chats:
        for place, turn in enumerate(conversation.turns):
            if turn.learned:
                before = [replace(earlier, learned=False) for earlier in conversation.turns[:place]]
                (example,) = encode_conversation(Chat((*before, turn)), TEMPLATES["llama2"], tokenizer, 500)
                assert example is not None
                one_by_one.append(example)
    assert len(one_by_one) == 5
    loss, gradient = sums(one_by_one, pack=False)
    for pack in (False, True):
        other_loss, other_gradient = sums(examples, pack)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=5e-6)  # norms are in float32


def test_spans_are_encoded_apart(tokenizer: Tokenizer) -> None:
    texts = ["Question: ", "yes", " and ", "no"]
    spans = [Span([text], learned=place % 2 == 1, bos=place == 0) for place, text in enumerate(texts)]
    example = encode_spans(spans, tokenizer, 100)
    pieces = [tokenizer.encode(texts[0]), *(tokenizer.encode_continuation(text) for text in texts[1:])]
    assert example is not None
    assert example.prompt + example.answer == [id for piece in pieces for id in piece]
    starts = list(accumulate(map(len, pieces), initial=0))
    assert len(example.prompt) == starts[1]
    assert example.given == ((starts[2] - starts[1], starts[3] - starts[1]),)


@pytest.mark.parametrize(
    ("roles", "place"), [("ua ua u", 0), ("uu a", 2), ("au", 1), ("ua a", 3), ("ua s ua", 3), ("s ua ua", 0)]
)
def test_a_text_template_needs_questions_and_answers_in_turn(tokenizer: Tokenizer, roles: str, place: int) -> None:
    """It says which turn is the first that does not fit. A last question without an answer is only given."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    turns = tuple(Turn(names[role], "x", role == "a") for role in roles.replace(" ", ""))
    if not place:
        assert encoded(Chat(turns), tokenizer).n_targets > 0
        return
    with pytest.raises(InputError, match=rf"^x:1: turn {place} is the .*'s; this template needs questions and answers"):
        TEMPLATES["plain"].examples(Chat(turns, where="x:1"))


def test_chats_take_a_text_template_where_the_model_has_none(tokenizer: Tokenizer) -> None:
    assert choose_template("auto", [chat()], tokenizer) == "plain"
    with pytest.raises(InputError, match="has no chat template"):
        choose_template("chat", [chat()], tokenizer)
