"""The text of ids that come one by one."""

from minift.tokenizer.base import Tokenizer


class TextStream:
    """The text of ids that come one by one, each part as soon as it is certain.

    A character may be spread over several ids; until its last one has come, `add` returns the empty string. The parts
    joined are what `decode_continuation` gives for all the ids, unless these end inside a character.

        stream = TextStream(tokenizer)
        for id in generate.stream(model, prompt, 64):
            print(stream.add(id), end="", flush=True)
        print(stream.end())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    def add(self, id: int) -> str:
        """Return the text that this id completes."""
        self._waiting.append(id)
        text = self._tokenizer.decode_continuation(self._waiting)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the start of a character, or (rarely) that character itself
            return ""
        self._waiting = []
        return text

    def end(self) -> str:
        """Return the text that still waits: empty, unless the ids end inside a character."""
        text, self._waiting = self._tokenizer.decode_continuation(self._waiting), []
        return text
