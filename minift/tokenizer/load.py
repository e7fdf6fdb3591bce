"""The tokenizer of a model's folder, whichever kind it is."""

import os
from pathlib import Path

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.storage.links import check_links
from minift.storage.names import base_of, is_adapter, model_path, similar_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from minift.tokenizer.special import added_tokens, named_ids, says_bos

# Everything that a tokenizer may consist of. All of it is saved with a model, used here or not: other tools need chat
# templates and added tokens to use the model.
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open the tokenizer in a model's folder, in the folder of a model's `.bin` file, or in a tokenizer's own file.

    `path` may also be "bundled", or a name on Hugging Face's hub whose files are in the cache of this machine. In a
    folder with both kinds of tokenizer, `tokenizer.json` is opened, because `transformers` uses that.

    Raises:
        InputError: when there is none, the file is damaged, or a `tokenizer.json` needs the `hf` extra.
    """
    path = model_path(path)
    is_folder = os.path.isdir(path)  # unlike Path.is_dir, it takes a name that is too long
    of_model = is_folder or path.suffix == ".bin"  # otherwise it is the tokenizer's own file
    folder = path if is_folder else path.parent
    file = next((folder / name for name in _KINDS if (folder / name).is_file()), None) if of_model else path
    if file is None:
        if is_adapter(folder):
            return load_tokenizer(base_of(folder))
        raise InputError(
            f"{folder}: has no tokenizer.model and no tokenizer.json; copy the model's into it "
            "(or make a folder of both with minift convert --tokenizer)"
        )
    try:
        if of_model:
            check_links(folder, () if is_folder else TOKENIZER_FILES)
        content = file.read_bytes()
        files = tokenizer_files(folder)
    except OSError as error:
        near = similar_path(file) if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{file}: cannot be read: {error.strerror or error}{near}") from None
    if file.suffix == ".json":
        return _from_json(file, content, files)
    if of_model:
        return _from_model_folder(file, content, files)
    return SentencePieceTokenizer(content, str(file))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the content of a folder's tokenizer files, by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def _from_json(file: Path, content: bytes, files: dict[str, bytes]) -> JsonTokenizer:
    if file.name != "tokenizer.json":
        files = {"tokenizer.json": content}
    try:
        return JsonTokenizer(content.decode(), file.parent, files)
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text") from None


def _from_model_folder(file: Path, content: bytes, files: dict[str, bytes]) -> Tokenizer:
    """Open a `tokenizer.model` together with what the other files of its folder say about special tokens."""
    tokenizer = SentencePieceTokenizer(content, str(file), files)
    tokenizer.adds_bos = says_bos(file.parent)
    if any(id >= tokenizer.vocab_size for id in added_tokens(file.parent)):  # only a tokenizer.json can hold these
        return JsonTokenizer(make_json(tokenizer), file.parent, files, (tokenizer.bos_id, tokenizer.eos_id))
    named = named_ids(file.parent, tokenizer.piece_id)
    tokenizer.bos_id, tokenizer.eos_id = named.get("bos", tokenizer.bos_id), named.get("eos", tokenizer.eos_id)
    return tokenizer


def check_fit(config: LlamaConfig, tokenizer: Tokenizer, exact: bool = False) -> None:
    """Raise InputError unless a tokenizer and a model belong together.

    The tokenizer must know no id that the model lacks, and their BOS and EOS must be the same. A published model may
    have spare ids; a model that is made for a tokenizer (`exact`) has none.
    """
    spare = config.vocab_size - tokenizer.vocab_size
    if spare < 0 or (exact and spare):
        found = f"the tokenizer has {tokenizer.vocab_size} pieces, the model a vocabulary of {config.vocab_size}"
    elif config.bos_token_id != tokenizer.bos_id:
        found = f"the model's bos_token_id is {config.bos_token_id}, the tokenizer's is {tokenizer.bos_id}"
    elif tokenizer.eos_id not in config.eos_token_ids:
        found = f"the model's eos_token_id is {config.eos_token_id}, the tokenizer's is {tokenizer.eos_id}"
    else:
        return
    remedy = "give the tokenizer that the model was trained with"
    if spare >= 0 and not exact:
        remedy += "; if it is this one, config.json has to say the ids of tokenizer_config.json or tokenizer.model"
    raise InputError(f"{found}: they do not fit; {remedy}")
