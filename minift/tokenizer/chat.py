"""The model's own chat template: a conversation as text, and what of it is learned, by construction.

An instruct model comes with a Jinja template (`chat_template.jinja`, or a key of `tokenizer_config.json`), and every
other program prompts it through that. So minift renders the same text, and has to know which characters of it the model
would have written. Never is an answer looked for in the text; there are two ways to know:

* The template marks it, `{% generation %} … {% endgeneration %}`.
* Otherwise by prefixes. P is the text of the turns before an answer with `add_generation_prompt`, which is what a model
  is given in use; F is the text up to the answer, included. P must be the beginning of F, and F that of the text in
  one; then the answer is the rest of F after P, with the token that ends its turn:

      P  <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎
      F  <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello.<|im_end|>⏎
      learned                                                Hello.<|im_end|>⏎

Some templates write a turn in another way once there are later ones: they drop its reasoning. Then each answer becomes
an example of its own, which ends with it: so the model was asked for it. A template whose P is not the beginning of F,
or that writes no token after an answer, is refused with the reason.

See what is done with a template: minift tokenizer templates FILE.jinja
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from minift.errors import InputError, one_line
from minift.model import Llama
from minift.prompts import Conversation, Pair, Span, Template, Turn
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat_files import chat_source, chat_variables, has_chat_template
from minift.tokenizer.chat_text import ChatText, Place

__all__ = ["ChatTemplate", "chat_template", "has_chat_template"]

_INSTEAD = "use a template of your own (--template FILE.jinja), or one of minift's (--template qa, llama3 …)"


def chat_template(tokenizer: Tokenizer, path: str | None = None, rendered: bool = False) -> "ChatTemplate":
    """Return the chat template that came with a tokenizer, or the one in a `.jinja` file.

    Args:
        path: the file of a template of your own, for this tokenizer.
        rendered: whether markers in the data's text count, too: somebody has written the data in a template already.

    Raises:
        InputError: where there is none, it is no template, or the `chat` extra is missing.
    """
    source, where = chat_source(tokenizer.files, path)
    bos, eos = tokenizer.pieces([tokenizer.bos_id, tokenizer.eos_id])
    text = ChatText(source, where, tokenizer.marker_names or (bos, eos), chat_variables(tokenizer), rendered)
    _ = text.ending  # whether it is a template at all
    return ChatTemplate(text) if tokenizer.marker_names else ChatTemplate(text, bos, eos)


@dataclass
class ChatTemplate(Template):
    """A chat template.

    Attributes:
        text: what it writes.
        bos, eos: the names of these tokens where a tokenizer finds no names in a text (SentencePiece): a span then says
            whether it begins and ends with them.
    """

    text: ChatText
    bos: str = ""
    eos: str = ""

    def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
        """Return one text of all turns up to the last that is learned, or one for each of these.

        Raises:
            InputError: with `file:line`, for a conversation that the template refuses, or fails on, or where it is not
                certain what of its text is learned.
        """
        turns, where = self._turns(conversation)
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
        learned = [place for place in answers if place > 0]  # a model is never asked for a conversation's first turn
        if not learned:
            return [self._spans(turns, where, self.text.render(turns, where), [])]
        learned = learned if learn == "all" else learned[-1:]
        if (spans := self._written_once(turns[: learned[-1] + 1], learned, where)) is not None:
            return [spans]
        prompts, texts = dict[int, str](), dict[int, str]()
        for place in learned:
            prompts[place], texts[place] = self._prompt_and_text(turns[:place], turns[place], where)
        turns = turns[: learned[-1] + 1]
        if self.text.marks_answers:
            return self._marked_examples(turns, where, prompts, texts)
        whole = texts[learned[-1]]
        stretches = [(len(prompts[place]), self._end(prompts[place], texts[place], whole)) for place in learned]
        if all(end for _, end in stretches):
            return [self._spans(turns, where, whole, stretches)]
        return [
            self._spans(turns[: place + 1], where, texts[place], [(len(prompts[place]), len(texts[place]))])
            for place in learned
        ]

    def prompt(self, conversation: Conversation) -> list[Span]:
        """Return what a model is given that is to answer the last question: in training the same comes before it."""
        turns, where = self._turns(conversation)
        turns = self._before_answer(conversation, turns)
        return self._spans(turns, where, self.text.render(turns, where, prompt=True), [], prompt=True)

    def answer_parts(self, conversation: Conversation) -> list[str]:
        """Return the parts of the last answer, as it follows its prompt, without what ends its turn."""
        turns, where = self._turns(conversation)
        before, answer = self._before_answer(conversation, turns), Turn("assistant", conversation.answer)
        prompt, text = self._prompt_and_text(before, answer, where)
        end = max(len(prompt), len(text.removesuffix(self.text.ending)))
        return _parts(text, self.text.data_names([*before, answer], where, text), (len(prompt), end))

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the tokens that end a turn of the assistant.

        Raises:
            InputError: when the template ends a turn with no token of the tokenizer.
        """
        names = dict.fromkeys(self.text.name.findall(self.text.ending))
        ids = [tokenizer.eos_id for name in names if name == self.eos]
        ids += [id for name in names if not self.eos for id in tokenizer.encode(name, bos=False)]
        if not ids:
            raise self._unended(self.text.where, self.text.ending)
        return ids

    def _turns(self, conversation: Conversation) -> tuple[Sequence[Turn], str]:
        where = conversation.where or "a conversation"
        if not conversation.turns:
            raise InputError(f"{where}: has no turns")
        has_system = any(turn.role == "system" and turn.text.strip() for turn in conversation.turns)
        if has_system and self.text.drops_system:
            raise InputError(f"{where}: has a system text, and the chat template {self.text.where} does not write it")
        return conversation.turns, where

    def _before_answer(self, conversation: Conversation, turns: Sequence[Turn]) -> Sequence[Turn]:
        before = turns[:-1] if isinstance(conversation, Pair) else conversation.until_answer()
        if not before:
            raise InputError(f"{conversation.where or 'a conversation'}: nothing comes before its answer")
        return before

    # Which characters are learned -------------------------------------------------------------------------------------

    def _written_once(self, turns: Sequence[Turn], learned: Sequence[int], where: str) -> list[Span] | None:
        """Return the spans of a text that grows turn by turn, without writing it again for each answer.

        Its beginnings are the texts of fewer turns, so the first answer shows what comes before and after each. None
        for any other template, and where an answer differs from the first. A chat of 4,000 turns takes 0.1 s, not 13.
        """
        if self.text.marks_answers or len(learned) < 3:
            return None
        whole = self.text.render(turns, where)
        starts, first, last = self.text.starts, learned[0], learned[-1]
        if starts is None or len(starts) != len(turns):
            return None
        starts = list(starts)  # the next rendering has its own
        prompt, text = self._prompt_and_text(turns[:first], turns[first], where)
        before, after = prompt[starts[first] :], text[starts[first + 1] :]
        if self.text.render(turns[:last], where, prompt=True) != whole[: starts[last]] + before:
            return None
        ends = [*starts[1:], len(whole) - len(after)]
        stretches = [(starts[place] + len(before), ends[place] + len(after)) for place in learned]
        for place, (start, end) in zip(learned, stretches, strict=True):
            if start > end or not (whole.startswith(before, starts[place]) and whole.startswith(after, ends[place])):
                return None
        return self._spans(turns, where, whole, stretches)

    def _prompt_and_text(self, before: Sequence[Turn], answer: Turn, where: str) -> tuple[str, str]:
        """Return what a model is given, and the text with its answer. Raise InputError unless that goes on from it."""
        prompt = self.text.render(before, where, prompt=True)
        text = self.text.render([*before, answer], where)
        if text.startswith(prompt):
            return prompt, text
        pairs = enumerate(zip(prompt, text, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), min(len(prompt), len(text)))
        raise InputError(
            one_line(
                f"{where}: the chat template {self.text.where} asks for an answer with {prompt[same:][:60]!r}, and "
                f"writes {text[same:][:60]!r} where the answer is known: what is learned would not go on from what the "
                f"model is asked; {_INSTEAD}"
            )
        )

    def _end(self, prompt: str, text: str, whole: str) -> int:
        """Return where a turn ends in the text in one, or 0 where that writes it in another way than its own text."""
        if whole.startswith(text):
            return len(text)
        # A template may write EOS at the end of a text, whichever turn is the last.
        shorter = text.removesuffix(self.text.variables.get("eos_token", ""))
        return len(shorter) if whole.startswith(shorter) and self.text.ends_turn(shorter[len(prompt) :]) else 0

    def _marked_examples(
        self, turns: Sequence[Turn], where: str, prompts: dict[int, str], texts: dict[int, str]
    ) -> list[list[Span]]:
        """Return the examples of a template that says itself what the model writes."""
        whole, starts = texts[len(turns) - 1], {place: len(prompt) for place, prompt in prompts.items()}
        for place, turn in enumerate(turns):
            if turn.role == "assistant" and place not in starts:
                starts[place] = len(self.text.render(turns[:place], where, prompt=True)) if place else 0
        of_turn: dict[int, list[Place]] = {place: [] for place in starts}
        for start, end in self.text.marked(turns, where, whole):
            of_turn[max((place for place in starts if starts[place] < end), default=min(starts))].append((start, end))
        if all(
            of_turn[place]
            and whole.startswith(prompts[place])
            and texts[place].startswith(whole[: of_turn[place][-1][1]])
            for place in prompts
        ):
            stretches = [piece for place in prompts for piece in _cut(of_turn[place], starts[place])]
            return [self._spans(turns, where, whole, stretches)]
        examples = []
        for place, text in texts.items():
            marked = self.text.marked(turns[: place + 1], where, text)
            own = [(start, end) for start, end in marked if end > starts[place]]
            if not own:
                raise InputError(
                    f"{where}: the chat template {self.text.where} marks nothing of turn {place + 1} with "
                    "{% generation %}, so that nothing of it is learned"
                )
            examples.append(self._spans(turns[: place + 1], where, text, _cut(own, starts[place])))
        return examples

    def _unended(self, where: str, text: str) -> InputError:
        return InputError(
            one_line(
                f"{where}: the chat template {self.text.where} ends the assistant's turn with {text[-40:]!r}, which is "
                f"no token of the tokenizer: a model that learns it never stops; {_INSTEAD}"
            )
        )

    # Spans ------------------------------------------------------------------------------------------------------------

    def _spans(
        self, turns: Sequence[Turn], where: str, text: str, learned: Sequence[Place], prompt: bool = False
    ) -> list[Span]:
        """Return a text in spans, those at the places `learned` learned. Raise InputError where one ends no turn."""
        nexts = [start for start, _ in learned[1:]] + [-1]
        for (start, end), following in zip(learned, nexts[: len(learned)], strict=True):
            if end != following and not self.text.ends_turn(text[start:end]):
                raise self._unended(where, text[start:end])
        names = self.text.data_names(turns, where, text, prompt)
        edges = sorted({0, len(text), *(edge for place in learned for edge in place)})
        spans = [Span(_parts(text, names, place), learned=place in learned) for place in pairwise(edges)]
        return [piece for span in spans for piece in self._with_flags(span)] if self.eos else spans

    def _with_flags(self, span: Span) -> list[Span]:
        """Return a span in pieces, which begin with BOS and end with EOS where the template wrote their names."""
        spans, parts, bos = list[Span](), list[str](), False
        for place, part in enumerate(span.parts):
            names = self.text.name.findall(part) if place % 2 == 0 else []
            texts = self.text.name.split(part) if names else [part]
            parts.append(texts[0])
            for name, text in zip(names, texts[1:], strict=True):
                if name == self.eos or bos or any(parts):
                    spans.append(Span(parts, span.learned, bos, eos=name == self.eos))
                parts, bos = [text], name == self.bos
        return [*spans, Span(parts, span.learned, bos)] if bos or any(parts) else spans


def stop_at_turns(model: Llama, template: Template, tokenizer: Tokenizer) -> None:
    """Let a model that is asked in a chat template stop at the tokens that end a turn, besides its own stop tokens."""
    if isinstance(template, ChatTemplate):
        stops = dict.fromkeys([*model.config.eos_token_ids, *template.stop_ids(tokenizer)])
        if max(stops) < model.config.vocab_size:
            model.config = replace(model.config, eos_token_id=tuple(stops))


def _cut(places: Sequence[Place], at: int) -> list[Place]:
    """Return stretches, one that goes on across a place cut there: what is encoded apart in use is so in training."""
    return [
        piece for start, end in places for piece in ([(start, at), (at, end)] if start < at < end else [(start, end)])
    ]


def _parts(text: str, names: Sequence[Place], place: Place) -> list[str]:
    """Return a stretch of a text in parts, at odd places the names of added tokens that the data spell."""
    start, end = place
    inside = [name for name in names if start <= name[0] and name[1] <= end]
    return [text[a:b] for a, b in pairwise([start, *(edge for name in inside for edge in name), end])]
