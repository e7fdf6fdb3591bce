"""minift: how a Llama is finetuned on next-token prediction, every step explicit.

The files of this folder are the way from text to a changed weight and back to text, in plain PyTorch:

    prompts → tokenizer/ → pack → model → cache → loss → optim → train → generate → lora → checkpoint → runner

`README.md` next to this file gives the order to read them in, and says what the other folders are for. Try it:

    minift finetune                # the bundled base on the bundled pairs
    python -c "import minift; print(minift.load_model('bundled').config)"

The names below are imported when they are first used, so that `minift --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minift.checkpoint import load_model as load_model
    from minift.checkpoint import save_model as save_model
    from minift.config import LlamaConfig as LlamaConfig
    from minift.config import TrainConfig as TrainConfig
    from minift.model import Llama as Llama
    from minift.runner import BasicModelRunner as BasicModelRunner
    from minift.storage.names import bundled as bundled
    from minift.tokenizer.base import Tokenizer as Tokenizer
    from minift.tokenizer.load import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

_HOME = {
    "BasicModelRunner": "runner",
    "LlamaConfig": "config",
    "TrainConfig": "config",
    "bundled": "storage.names",
    "Llama": "model",
    "Tokenizer": "tokenizer.base",
    "load_model": "checkpoint",
    "load_tokenizer": "tokenizer.load",
    "save_model": "checkpoint",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"minift.{_HOME[name]}"), name)
    raise AttributeError(f"module 'minift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
