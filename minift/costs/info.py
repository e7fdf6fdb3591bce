"""Say what a model is and what it costs, without reading its weights: the numbers of `minift info`.

minift info --model bundled
minift info --config llama2-7b --batch-size 4 --max-length 2048
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minift.config import LlamaConfig
from minift.costs.communication import communication
from minift.costs.flops import BYTES, count_parameters, forward_flops_per_token, training_flops_per_token
from minift.costs.memory import inference_memory, training_memory
from minift.errors import InputError
from minift.formats.files import dtype_name
from minift.formats.open import open_model, shape_named
from minift.formats.opened import Opened
from minift.tokenizer.load import check_fit, load_tokenizer, tokenizer_files
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from minift.values import check_number, size

MESSAGES_DTYPE = "bfloat16"  # of the arithmetic for which the messages between processes are counted


def info(
    model: str | Path | None,
    config: str | None = None,
    batch_size: int = 1,
    length: int | None = None,
    device: str = "cpu",
    world: int | None = None,
) -> dict[str, Any]:
    """Return all that is known of a model, or of a shape alone, as plain values.

    Args:
        model: a model of any format, or its name; its names and shapes are checked.
        config: instead of a model, a preset's name or a `config.json`.
        batch_size, length: the rows and tokens that the ledger of memory counts; by default one text of all the model's
            positions, at most 4,096.
        device: the kind of machine that the ledger of training is for, cpu or cuda.
        world: the number of processes whose messages are counted; None counts none.

    Raises:
        InputError: for a model that cannot be opened, an unknown preset, or a number out of bounds.
    """
    opened = open_model(model) if model is not None else None
    shape = opened.config if opened is not None else shape_named(str(config))
    length = min(shape.max_position_embeddings, 4_096) if length is None else length
    check_number("batch_size", batch_size, least=1)
    check_number("max_length", length, least=1, below=shape.max_position_embeddings + 1)
    if world is not None:
        check_number("world", world, least=1)
    parameters = count_parameters(shape)
    return {
        **(_file_facts(opened) if opened is not None else {"config": str(config)}),
        "shape": shape.to_dict(),
        "parameters": parameters.total,
        "parameters_without_embedding": parameters.without_embedding,
        "tied": shape.tie_word_embeddings,
        "batch_size": batch_size,
        "length": length,
        "forward_flops_per_token": forward_flops_per_token(shape, length),
        "training_flops_per_token": training_flops_per_token(shape, length),
        "device": device,
        "training_memory": {dtype: training_memory(shape, dtype, batch_size, length, device=device) for dtype in BYTES},
        "inference_memory": {dtype: inference_memory(shape, dtype, batch_size, length) for dtype in BYTES},
        **({} if world is None else {"world": world, "messages": _messages(shape, world)}),
    }


def _messages(shape: LlamaConfig, ranks: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the collectives of a step, by the way in which the ranks share it and by kind."""
    return {
        parallel: {
            kind: {"calls": each.calls, "bytes": each.nbytes, "sent_by_each": each.sent(kind, ranks)}
            for kind, each in communication(shape, parallel, ranks, MESSAGES_DTYPE).items()
        }
        for parallel in ("ddp", "fsdp")
    }


def _file_facts(opened: Opened) -> dict[str, Any]:
    """Return what a model's files say of themselves."""
    dtypes: dict[str, int] = {}
    for spec in opened.specs.values():
        name = dtype_name(spec.dtype)
        dtypes[name] = dtypes.get(name, 0) + spec.nbytes
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    try:
        tokenizer = load_tokenizer(opened.path)
        check_fit(opened.config, tokenizer)
        kind = "SentencePiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizer.json"
        description = f"{kind}, {tokenizer.vocab_size:,} ids"
    except InputError as error:
        description = f"none that can be used ({error})" if tokenizer_files(folder) else "none"
    return {
        "model": str(opened.path),
        "format": opened.format,
        "files": [file.path.name for file in opened.files],
        "stored": dtypes,
        "tokenizer": description,
        "notes": list(opened.notes),
    }


def info_text(result: Mapping[str, Any]) -> str:
    """Return the numbers of `info` as a page of text."""
    batch, length = result["batch_size"], result["length"]
    facts = [*(_file_lines(result) if "model" in result else []), *_shape_lines(result)]
    width = max(len(name) for name, _ in facts) + 2
    text = [f"{name:<{width}}{value}" for name, value in facts]
    text += ["", *_ledger(f"training on {result['device']}, {batch} x {length:,} tokens", result["training_memory"])]
    text += ["(weights, gradients and moments stay in float32; the dtype is that of the arithmetic)"]
    text += ["", *_ledger(f"inference, {batch} x {length:,} tokens", result["inference_memory"])]
    if "messages" in result:
        text += ["", *_message_lines(result["messages"], result["world"])]
    return "\n".join(text)


def _file_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    stored = ", ".join(f"{size(nbytes)} in {dtype}" for dtype, nbytes in result["stored"].items())
    files = result["files"]
    return [
        ("model", f"{result['model']} ({result['format']})"),
        ("weights", f"{stored}; {files[0] if len(files) == 1 else f'{len(files)} files'}"),
        ("tokenizer", result["tokenizer"]),
        *(("note", note) for note in result["notes"]),
    ]


def _shape_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape = result["shape"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    kind = "multi-head" if heads == kv_heads else "multi-query" if kv_heads == 1 else "grouped-query"
    rope, scaling = f"base {shape['rope_theta']:,.0f}", shape["rope_scaling"]
    if scaling:
        original = scaling["original_max_position_embeddings"]
        rope += f", scaled by {scaling['factor']:g} from {original:,} positions (llama3)"
    embedding = result["parameters"] - result["parameters_without_embedding"]
    matrices = "embedding and head are one matrix" if result["tied"] else "embedding and head are two matrices"
    return [
        ("layers", f"{shape['num_hidden_layers']} of width {shape['hidden_size']:,}"),
        ("attention", f"{heads} heads of {shape['head_dim']}, {kv_heads} for keys and values ({kind})"),
        ("feed-forward", f"{shape['intermediate_size']:,} (SwiGLU)"),
        ("vocabulary", f"{shape['vocab_size']:,}; {matrices}"),
        ("positions", f"{shape['max_position_embeddings']:,}; RoPE {rope}"),
        ("parameters", f"{result['parameters']:,}"),
        ("  without embedding", f"{result['parameters_without_embedding']:,} ({embedding:,} in it)"),
        (f"FLOPs a token (T = {result['length']:,})", f"{_si(result['forward_flops_per_token'])} forward"),
        ("", f"{_si(result['training_flops_per_token'])} in training"),
    ]


def _message_lines(messages: Mapping[str, Mapping[str, Mapping[str, float]]], world: int) -> list[str]:
    """Return a table of what the ranks send each other, with a line for each kind of collective."""
    title = f"messages of a step, {world:,} processes"
    width = len(title) + 2
    lines = [f"{title:<{width}}{'calls':>9}{'bytes':>11}{'each sends':>13}"]
    for parallel, kinds in messages.items():
        for kind, each in kinds.items():
            cells = f"{each['calls']:>9,}{size(each['bytes']):>11}{size(each['sent_by_each']):>13}"
            lines.append(f"{f'{parallel}, {kind}':<{width}}{cells}")
    return [*lines, f"(counted for one micro-batch, {MESSAGES_DTYPE} arithmetic, and all weights trained)"]


def _ledger(title: str, ledgers: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a table with a column for each dtype, and a line for each use of memory."""
    rows: dict[str, dict[str, int]] = {}
    for dtype, ledger in ledgers.items():
        for name, nbytes in ledger.items():
            rows.setdefault(name, {})[dtype] = nbytes
    rows["total"] = {dtype: sum(ledger.values()) for dtype, ledger in ledgers.items()}
    width = max(map(len, [title, *rows])) + 2
    lines = [f"{title:<{width}}" + "".join(f"{dtype:>11}" for dtype in ledgers)]
    for name, row in rows.items():
        cells = "".join(f"{size(row[dtype]) if dtype in row else '-':>11}" for dtype in ledgers)
        lines.append(f"{name:<{width}}{cells}")
    return lines


def _si(value: float) -> str:
    """Return a number with its unit: 1234567.0 → "1.23 M"."""
    units = ["", " k", " M", " G"]
    while value >= 1_000 and len(units) > 1:
        value /= 1_000
        del units[0]
    return f"{value:.3g}{units[0]}"
