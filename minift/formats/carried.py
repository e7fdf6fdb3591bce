"""Read what a Hugging Face folder holds besides its weights, and write it into the folder that is made of it.

Training changes the weights, and which ids end a text. The rest of a folder is somebody's work, too, and other programs
use it. So it is carried over, by one rule for runs and for `minift convert`:

* `config.json` stays as it is, but for `eos_token_id` where training added a stop token, the dtype where the weights
  are written in another one, and `auto_map`, which names code;
* `generation_config.json` stays as it is, but for the same stop tokens; there is none where there was none;
* a tokenizer's files stay as they are (`tokenizer/load.py` lists them), and so does other text: `.json`, `.jinja`,
  `.txt`, `.md` and licences, up to LARGEST bytes a file;
* weights of any format with their indexes, an adapter's config, checksums, hidden files and the state of an earlier
  training are left out: the new folder has its own, or needs none;
* folders, code, and everything else are left out, and that is said.

A file in which nothing changes keeps its bytes. All of it is read before the first step of a run, so that no damaged
file can end the run when its work is done.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.files import Specs, dtype_name, widest
from minift.formats.generation import GENERATION_FILE
from minift.storage.checksums import CHECKSUMS
from minift.storage.links import check_links
from minift.storage.names import ADAPTER_FILE
from minift.tokenizer.load import TOKENIZER_FILES
from minift.values import read_json

CONFIG_FILE = "config.json"
LARGEST = 16 * 10**6  # bytes of a file: the vocabularies of published models have up to about 10 million
LARGEST_SUM = 64 * 10**6  # bytes of all files, which are in memory during a run
DEEPEST = 100  # objects and lists inside of each other, in the files that are written anew
_SHOWN = 5  # names of files in a message

_TEXT = (".json", ".jinja", ".txt", ".md")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
_OLDER_TOKENIZER_FILES = {"vocab.json", "merges.txt"}  # of GPT-2's; a tokenizer.json has all that is in them
_CODE_KEY = "auto_map"  # of a config: classes in files of code, which the model does not need here
# An adapter's config next to a whole model would have `transformers` look for the adapter.
_REPLACED = {CONFIG_FILE, GENERATION_FILE, CHECKSUMS, ADAPTER_FILE, "trainer_state.json", *TOKENIZER_FILES}


@dataclass(frozen=True)
class Carried:
    """The rest of a Hugging Face folder: all that it holds besides its weights.

    Attributes:
        config, generation: the content of `config.json` and `generation_config.json`; the latter may be missing.
        files: the content of every other file that is carried over, by name, without the tokenizer's.
        left_out: names of what is not, where a user would not expect it.
        dtypes: of the weights in the folder's files, by minift's name.
        ends: ids with which training has taught the model to end a text.
    """

    config: "_Json"
    generation: "_Json | None"
    files: Mapping[str, bytes]
    left_out: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    ends: tuple[int, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a note on what is left out, if a user should know of something."""
        names = [*self.left_out, *(["auto_map in config.json"] if _CODE_KEY in self.config.values else [])]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return (f"not copied: {', '.join(names[:_SHOWN])}{more}",) if names else ()

    def in_words(self) -> str:
        """Return a line on the folder that will be made of it: the dtype of its weights, and what it will not have."""
        dtypes = " and ".join(dict.fromkeys(map(dtype_name, self.dtypes.values())))
        line = f"final/ will be a Hugging Face folder as the base is, with the weights in {dtypes}"
        return "; ".join([line, *self.notes])

    def write(self, folder: Path, specs: Specs) -> None:
        """Write all of it into a folder; `config.json`, by which the folder is recognised, comes last.

        Args:
            specs: of the weights that are written into the folder.
        """
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        ends = {"config": self.config.ids(LlamaConfig.eos_token_id)}
        ends["generation"] = (self.generation and self.generation.ids(None)) or ends["config"]
        added = [id for id in self.ends if id not in ends["config"] and id not in ends["generation"]]
        if self.generation is not None:
            (folder / GENERATION_FILE).write_bytes(self.generation.changed(_ends(ends["generation"], added)))
        changes = _ends(ends["config"], added)
        if {name: spec.dtype for name, spec in specs.items()} != self.dtypes:
            keys = {"dtype", "torch_dtype"} & set(self.config.values) or {"torch_dtype"}
            changes |= dict.fromkeys(keys, dtype_name(widest(specs)))
        (folder / CONFIG_FILE).write_bytes(self.config.changed(changes, without=_CODE_KEY))


@dataclass(frozen=True)
class _Json:
    """A JSON object, and the bytes that it was read from."""

    content: bytes
    values: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, file: Path) -> "_Json":
        """Read a file. Raises InputError for one that is no JSON object, or nested too deeply to be written again."""
        values = read_json(file)
        level: list[Any] = [values]
        depth = 0
        while level:
            depth += 1
            if depth > DEEPEST:
                raise InputError(f"{file}: nested too deeply: at most {DEEPEST} objects or lists inside of each other")
            level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
            level = [child for child in level if isinstance(child, dict | list)]
        return cls(file.read_bytes(), values)

    def ids(self, default: Any) -> list[int]:
        """Return the ids that end a text, by `eos_token_id`; `default` where that key is missing."""
        ends = self.values.get("eos_token_id", default)
        return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]

    def changed(self, changes: Mapping[str, Any], without: str = "") -> bytes:
        """Return the content with some values changed and one key left out: the bytes that were read, where none is."""
        if not changes and without not in self.values:
            return self.content
        values = {key: value for key, value in {**self.values, **changes}.items() if key != without}
        return (json.dumps(values, indent=2) + "\n").encode()


def _ends(own: list[int], added: list[int]) -> dict[str, Any]:
    """Return the change of a config that gets stop tokens in addition to its own; no change where none is added."""
    ends = [*own, *added]
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if added else {}


def read_carried(folder: Path, specs: Specs, own_tokenizer: bool = True) -> Carried:
    """Read what a Hugging Face folder holds besides its weights.

    Args:
        specs: of the weights in the folder, by minift's name.
        own_tokenizer: whether the new folder gets the tokenizer of this one.

    Raises:
        InputError: for a damaged `config.json` or `generation_config.json`, and for a link out of the folder.
    """
    check_links(folder)
    generation = folder / GENERATION_FILE
    replaced = _REPLACED | (set() if own_tokenizer else _OLDER_TOKENIZER_FILES)
    files, left_out, room = dict[str, bytes](), list[str](), LARGEST_SUM
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if name in replaced or name.startswith(".") or name.endswith(_WEIGHTS):
            continue
        content = _text_of(entry, min(LARGEST, room))
        if content is None:
            left_out.append(name)
        else:
            files[name] = content
            room -= len(content)
    return Carried(
        _Json.read(folder / CONFIG_FILE),
        _Json.read(generation) if generation.is_file() else None,
        files,
        tuple(left_out),
        {name: spec.dtype for name, spec in specs.items()},
    )


def _text_of(entry: Path, largest: int) -> bytes | None:
    """Return the content of a file that is text, by its name, and not too large; None for anything else."""
    is_text = entry.suffix.lower() in _TEXT or (not entry.suffix and entry.name.upper().startswith(_LICENCES))
    try:
        # A list of checksums cannot have a name with a line break, or one that is not UTF-8.
        if not is_text or not entry.is_file() or not entry.name.isprintable() or entry.stat().st_size > largest:
            return None
        return entry.read_bytes()
    except OSError:
        return None
