"""Recognise what a run was made from, so that it is resumed on nothing else.

Everything is taken as it enters the run: the weights after they are loaded, the records after they are encoded. So a
model in another format or a table that was a JSON file is the same, whatever the files' names and times; what is not
the same is refused by name. Of a model the bits are summed, which reads its weights once in memory: 0.1 s for 500 MB on
two cores of an Intel Xeon.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift import __version__
from minift.config import FREE, TrainConfig
from minift.data.records import find_files
from minift.data.shards import CHANGED
from minift.data.stream import fingerprint
from minift.distributed.sharding import local_shard
from minift.distributed.world import World
from minift.errors import InputError
from minift.model import Llama
from minift.pack import PADDING, Batch
from minift.runs.inputs import DATA, is_path
from minift.tokenizer.base import Tokenizer
from minift.train import TrainState
from minift.values import read_json

OF_THE_END = ("save_format", "keep_last", "eval_every", "patience")  # settings that decide no step, but what is kept
REMEDY = "restore it, or start a new run"


def contents(
    inputs: Mapping[str, Any], config: TrainConfig, tokenizer: Tokenizer, held_out: Sequence[Batch], state: TrainState
) -> dict[str, Any]:
    """Return what a run is made from, as plain values by which it is recognised. Call on all ranks.

    Args:
        inputs: the job's, by name.
        held_out: what the run is evaluated on.
        state: before the first step, and before a step folder is loaded.
    """
    sources = {name: find_files(inputs[name], say=None) for name in DATA if inputs.get(name)}
    found: dict[str, Any] = {
        "minift": __version__,
        "torch": str(torch.__version__),
        "device": state.world.device.type,
        "shape": state.model.config.to_dict(),
        "tokenizer": {name: _checksum(content) for name, content in sorted(tokenizer.files.items())},
        "files": {name: [fingerprint(file) for file in files] for name, files in sources.items()},
        "held_out": _documents(held_out),
    }
    if inputs.get("model"):
        found["weights"] = _weights(state.model, state.world)
    settings: Any = state.batches.state_dict()["settings"]
    if "data" in settings:
        found["records"] = settings["data"]
    if is_path("template", config.template):
        found["template"] = _checksum(Path(config.template).read_bytes())
    return dict(json.loads(json.dumps(found)))


def check_contents(
    saved: Mapping[str, Any], now: Mapping[str, Any], inputs: Mapping[str, Any], template: str, where: Path
) -> None:
    """Compare a run's `contents` at its beginning with those of now. Print a line about another torch or device.

    Args:
        where: the file that `saved` is from.

    Raises:
        InputError: for the first difference, with the name of what has changed.
    """
    for name, value in saved.items():
        if type(value) is not type(now.get(name)):
            raise InputError(f"{where}: contents: {name!r} is not what a run with these inputs has")
    if message := next(_differences({**now, **saved}, now, inputs, template), None):
        raise InputError(f"{message}; {REMEDY}")
    for name in ("torch", "device"):
        if saved.get(name, now[name]) != now[name]:
            print(f"note: the run began with {name} {saved[name]}, now it is {now[name]}: last digits may differ")


def run_id(out: Path) -> str | None:
    """Return a checksum of all that decides a run's steps, by which its folders are known; None where it has none.

    The places of files are not part of it, nor the machine: the same run may be resumed with others.
    """
    try:
        run = read_json(out / "config.json")
    except InputError:
        return None
    train, saved = run.get("train"), run.get("contents")
    if not isinstance(train, dict) or not isinstance(saved, dict):
        return None
    settings = {name: value for name, value in train.items() if name not in (*FREE, *OF_THE_END, "template")}
    made_from = {name: value for name, value in saved.items() if name not in ("minift", "torch", "device", "files")}
    return _checksum(json.dumps([run.get("job"), settings, made_from], sort_keys=True).encode())


def _differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], inputs: Mapping[str, Any], template: str
) -> Iterator[str]:
    """Yield a line for each difference, by the name of what has changed."""
    source, tokenizer = (inputs.get(name) or inputs.get("model") for name in ("config", "tokenizer"))
    for key, value in now["shape"].items():
        if (was := saved["shape"].get(key, value)) != value:  # a later version may have more keys
            yield f"{source}: {key} was {was} when the run began, and is {value}"
    if saved.get("weights") != now.get("weights"):
        was, value = saved["weights"], now["weights"]
        yield f"{source}: the model that the run began with has changed since: its checksum was {was}, and is {value}"
    if saved.get("template") != now.get("template"):
        yield f"{template}: the template has changed since the run began"
    for name in sorted({*saved["tokenizer"], *now["tokenizer"]}):
        if saved["tokenizer"].get(name) != now["tokenizer"].get(name):
            yield f"{tokenizer}: the tokenizer's {name} is not what it was when the run began"
    files = [(saved["files"].get(name), now["files"].get(name)) for name in DATA]
    if saved.get("records") != now.get("records"):
        yield f"{_changed_file(*files[0], inputs['data'][0])}: {CHANGED}: {saved['records']}; now {now['records']}"
    if "records" not in now and files[0][0] != files[0][1]:  # pages, which are too many to be read first
        yield f"{_changed_file(*files[0], inputs['data'][0])}: {CHANGED}"
    if saved["held_out"] != now["held_out"]:
        place = 2 if inputs.get("validation") else 1 if inputs.get("test") else 0
        name = _changed_file(*files[place], inputs[DATA[place]][0])
        yield f"{name}: the held-out data has changed since the run began: {saved['held_out']}; now {now['held_out']}"


def _changed_file(
    saved: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]] | None, other: str
) -> str:
    """Return the name of the first file that is not as it was; `other` where all are."""
    pairs = zip(saved or (), now or (), strict=False)
    return next((str(is_now.get("name")) for was, is_now in pairs if was != is_now), other)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _documents(batches: Sequence[Batch]) -> str:
    """Return how many documents some batches hold, and a checksum of them. Their order makes no difference."""
    found: list[bytes] = []
    for batch in batches:
        for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.document_ids, strict=True):
            for id in ids.unique().tolist():
                if id != PADDING:
                    place = ids == id
                    found.append(torch.stack((tokens[place], targets[place])).numpy().tobytes())
    return f"{len(found)} texts, checksum {_checksum(b''.join(sorted(hashlib.sha256(one).digest() for one in found)))}"


def _weights(model: Llama, world: World) -> str:
    """Return a checksum of a model's weights without adapters, however they are sharded. Call on all ranks."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    sums = [sum_of_bits(local_shard(tensor)) for tensor in weights.values()]
    if world.parallel == "fsdp":
        sums = [sum(parts) for parts in zip(*world.gather(sums), strict=True)]
    lines = (
        f"{name} {tuple(tensor.shape)} {total % 2**64}\n"
        for (name, tensor), total in zip(weights.items(), sums, strict=True)
    )
    return _checksum("".join(lines).encode())


def sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers, modulo 2⁶⁴. Where it can be, eight bytes are read as one.

    (A row is never parted between ranks, so the sum is that of their sums.)
    """
    joined = 8 // tensor.element_size()
    if tensor.ndim > 1 and tensor.shape[-1] % joined == 0:
        if tensor.storage_offset() % joined or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return int(tensor.view(torch.int64).sum())
    integers = {1: torch.int64, 2: torch.int32, 4: torch.int16}[joined]
    return int(tensor.view(integers).sum(dtype=torch.int64))
