"""The tokenizer of a model's folder."""

from pathlib import Path

from minift.errors import InputError
from minift.storage.links import check_links
from minift.storage.names import base_of, is_adapter
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.sentencepiece import SentencePieceTokenizer

# Everything that a tokenizer may consist of. All of it travels with every save, used here or not: chat templates and
# added tokens are what other tools need to go on with the model.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_KINDS = ("tokenizer.json", "tokenizer.model")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's tokenizer files, by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, beside a model's `.bin` file, or in a tokenizer's own file.

    Where a folder has both kinds, `tokenizer.json` counts: that is what `transformers` uses.

    Raises:
        InputError: when there is none, the file is damaged, or a `tokenizer.json` needs the `hf` extra.
    """
    path = Path(path)
    named = not path.is_dir() and path.suffix != ".bin"  # the file itself, not something in its folder
    folder = path if path.is_dir() else path.parent
    file = path if named else next((folder / n for n in _KINDS if (folder / n).is_file()), None)
    if file is None:
        if is_adapter(folder):  # the tokenizer is that of the model which it is for
            return load_tokenizer(base_of(folder))
        raise InputError(
            f"{folder}: has no tokenizer.model and no tokenizer.json; put the model's there "
            "(or make a folder of both with minift convert --tokenizer)"
        )
    try:
        if not named:
            check_links(folder, () if path.is_dir() else TOKENIZER_FILES)
        content = file.read_bytes()
        files = tokenizer_files(folder)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    from minift.tokenizer.huggingface import JsonTokenizer, with_added_tokens
    from minift.tokenizer.special import added_tokens, named_ids

    if file.suffix == ".json":
        if file.name != "tokenizer.json":
            files = {"tokenizer.json": content}
        try:
            return JsonTokenizer(content.decode(), folder, files)
        except UnicodeDecodeError:
            raise InputError(f"{file}: not UTF-8 text") from None
    if named:
        return SentencePieceTokenizer(content, str(file))
    tokenizer = SentencePieceTokenizer(content, str(file), files)
    if any(id >= tokenizer.vocab_size for id in added_tokens(folder)):
        return with_added_tokens(tokenizer, folder)
    special = named_ids(folder, tokenizer.piece_id)
    tokenizer.bos_id, tokenizer.eos_id = special.get("bos", tokenizer.bos_id), special.get("eos", tokenizer.eos_id)
    return tokenizer
