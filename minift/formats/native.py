"""minift's own folder: `config.json` with the shape, `model.pt` with the weights under minift's names.

The simplest of the formats: names, layout and config are minift's, so nothing has to be translated.
"""

from pathlib import Path

from minift.config import LlamaConfig
from minift.formats.files import Read, Specs
from minift.formats.opened import Opened, named_sources, open_tensors
from minift.formats.pt_file import write_pt


def open_native(folder: Path) -> Opened:
    """Open a minift checkpoint. Raises InputError when it is damaged, or does not hold what its config says."""
    return open_weights(folder, LlamaConfig.from_file(folder / "config.json"))


def open_weights(folder: Path, config: LlamaConfig) -> Opened:
    """Open the `model.pt` of a folder, which must hold a model of this shape. Raises InputError as `open_native`."""
    file = open_tensors(folder / "model.pt")
    return Opened(folder, "native", config, named_sources(dict.fromkeys(file.specs, file), config, file.path))


def write_native(folder: Path, config: LlamaConfig, specs: Specs, read: Read) -> None:
    """Write `model.pt` and `config.json` into a folder; the config, by which it is recognised, comes last."""
    write_pt(folder / "model.pt", specs, read)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
