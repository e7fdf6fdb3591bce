"""The model's own chat template."""

from minift.errors import InputError
from minift.prompts import Conversation, Span, Template
from minift.tokenizer.base import Tokenizer


class ChatTemplate(Template):
    """A model's own chat template."""

    def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
        """Return the texts to train on."""
        raise NotImplementedError

    def prompt(self, conversation: Conversation) -> list[Span]:
        """Return what a model is given."""
        raise NotImplementedError

    def answer_parts(self, conversation: Conversation) -> list[str]:
        """Return the parts of the last answer."""
        return ["", conversation.answer]

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the tokens that end its turns."""
        return []


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Return whether a chat template came with the tokenizer."""
    return False


def chat_template(tokenizer: Tokenizer, path: str | None = None, rendered: bool = False) -> ChatTemplate:
    """Return the chat template that came with the tokenizer, or the one in a `.jinja` file."""
    raise InputError("no chat template")
