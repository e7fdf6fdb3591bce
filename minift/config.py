"""The shape of a model and the settings of its training: two frozen dataclasses, read from JSON and written as JSON.

Every choice that changes a run's result is in one of these two objects, so a run can be saved, read back, compared and
resumed. A field of `TrainConfig` has its help text and its bounds with it: the flags of the command line
are made of the fields (`cli/train.py`), so a new field here is a new flag there. An unknown key is refused by its name.

    python -c "from minift import LlamaConfig; print(LlamaConfig.preset('stories15m').to_json())"

Read next: `prompts.py`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.errors import InputError, did_you_mean
from minift.values import build, check_number, read_json

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("auto", "ddp", "fsdp")
LEARN = ("all", "last")
SAVE_FORMATS = ("auto", "native", "hf")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = ("cosine", "linear", "constant")
LOSS_CHUNK = 1_024  # targets whose logits exist at the same time: fewer are slower on a CPU, more take more memory
MOST_WORKERS = 256  # processes for encoding; a typing error must not start a million of them


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of RoPE, for texts longer than those it was pretrained on: `rope_scaling` of type llama3.

    Raises InputError when the numbers do not fit together. Source: "The Llama 3 Herd of Models" (arXiv 2407.21783),
    section 3.4.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check_number(f"rope_scaling: {item.name}", getattr(self, item.name), above=0)
        if not self.low_freq_factor < self.high_freq_factor:
            raise InputError("rope_scaling: low_freq_factor must be below high_freq_factor")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "RopeScaling":
        """Read a config's `rope_scaling`. Raises InputError for another type of scaling, and for wrong keys."""
        values = dict(values)
        kind = values.pop("rope_type", values.pop("type", None))
        if kind != "llama3":
            raise InputError(f"{where}: rope_type is {kind!r}; minift implements 'llama3', and no scaling (null)")
        missing = sorted({item.name for item in dataclasses.fields(cls)} - set(values))
        if missing:
            raise InputError(f"{where}: key {missing[0]!r} is missing")
        return build(RopeScaling, values, where)

    def apply(self, frequencies: "Tensor") -> "Tensor":
        """Slow RoPE's slow pairs of channels down. frequencies: radians per position, float32 [C/2].

        A pair that makes more than `high_freq_factor` full rotations within the original positions stays as it is, one
        that makes fewer than `low_freq_factor` rotates `factor` times as slowly, and between them both are mixed.
        """
        rotations = self.original_max_position_embeddings / (2 * math.pi / frequencies)
        kept = ((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies

    def to_dict(self) -> dict[str, Any]:
        """Return the value of `rope_scaling` for a config.json."""
        return {"rope_type": "llama3", **dataclasses.asdict(self)}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, under Hugging Face's names (`transformers.LlamaConfig`).

    `eos_token_id` may be several ids, because a chat model ends a turn with one and a document with another. Generation
    stops at each of them (`eos_token_ids`).

    Raises:
        InputError: when a size is not positive or the sizes do not fit together.
    """

    vocab_size: int = 32_000
    hidden_size: int = 288
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    head_dim: int = 0  # 0: hidden_size / num_attention_heads, filled in below
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        if self.head_dim == 0 and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim, or change one of them"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "initializer_range",
        ):
            check_number(name, getattr(self, name), above=0)
        check_number("num_hidden_layers", self.num_hidden_layers, below=10_000)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        widths = (self.vocab_size, self.intermediate_size, self.head_dim * self.num_attention_heads)
        if self.hidden_size * max(widths) >= 2**48:
            raise InputError(f"hidden_size {self.hidden_size} by {max(widths)} is a matrix larger than any memory")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs of channels")
        if isinstance(self.eos_token_id, tuple) and len(self.eos_token_id) == 1:
            object.__setattr__(self, "eos_token_id", self.eos_token_id[0])
        if not self.eos_token_ids:
            raise InputError("eos_token_id is empty; without one, generation never ends")
        for name, id in (("bos_token_id", self.bos_token_id), *(("eos_token_id", id) for id in self.eos_token_ids)):
            if not 0 <= id < self.vocab_size:
                raise InputError(f"{name} {id} is not an id below vocab_size {self.vocab_size}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return every id that ends a text."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """Return the shape called `name`, one of `PRESETS`. Raises InputError for an unknown name."""
        if name not in PRESETS:
            raise InputError(
                f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)} (or a config.json)"
            )
        return LlamaConfig(**PRESETS[name])

    @classmethod
    def named(cls, name: str) -> "LlamaConfig":
        """Return a preset, or read a `config.json` of minift. Raises InputError when there is none."""
        return cls.from_file(name) if name.endswith(".json") else cls.preset(name)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> "LlamaConfig":
        """Build a shape from the values of a minift `config.json`; `where` is named in errors.

        Raises:
            InputError: for a key that is not a field, a missing key (a shape is never guessed), a value of the wrong
                type, or another architecture.
        """
        values = dict(values)
        for key, expected in _FIXED_KEYS.items():
            found = values.pop(key, expected)
            if found != expected:
                raise InputError(f"{where}: {key} is {found!r}; minift implements {expected!r}")
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = RopeScaling.from_dict(values["rope_scaling"], f"{where}: rope_scaling")
        ends = values.get("eos_token_id")
        if isinstance(ends, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in ends):
            values["eos_token_id"] = tuple(ends)
        config = build(LlamaConfig, values, where)
        missing = sorted(_REQUIRED_KEYS - set(values))
        if missing:
            raise InputError(f"{where}: key {missing[0]!r} is missing")
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> "LlamaConfig":
        """Read a shape from a JSON file. Raises InputError when it is missing, not JSON, or holds an unknown key."""
        return cls.from_dict(read_json(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the values of a `config.json`: the fields, and the keys by which other tools recognise a Llama."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["rope_scaling"] = self.rope_scaling and self.rope_scaling.to_dict()
        return {**_FIXED_KEYS, **values}

    def to_json(self) -> str:
        """Return the text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


# A file must have these keys, because models differ in them. It may leave out the others, which have defaults.
_REQUIRED_KEYS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
}
_FIXED_KEYS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
}


def _shape(
    vocab: int, width: int, layers: int, heads: int, kv_heads: int, hidden: int, positions: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **more,
    }


# `bundled` is the base in data/base; the others are published shapes, for benchmarks and for training from scratch.
PRESETS: dict[str, dict[str, Any]] = {
    "bundled": _shape(2_048, 192, 4, 6, 2, 448, 512, True),
    "stories260k": _shape(512, 64, 5, 8, 4, 172, 512, True),
    "stories15m": _shape(32_000, 288, 6, 6, 6, 768, 256, True),
    "stories42m": _shape(32_000, 512, 8, 8, 8, 1_376, 1_024, True),
    "stories110m": _shape(32_000, 768, 12, 12, 12, 2_048, 1_024, True),
    "smollm2-135m": _shape(
        49_152, 576, 30, 9, 3, 1_536, 8_192, True, rope_theta=100_000.0, bos_token_id=0, eos_token_id=0
    ),
    "tinyllama-1.1b": _shape(32_000, 2_048, 22, 32, 4, 5_632, 2_048, False),
    "llama2-7b": _shape(32_000, 4_096, 32, 32, 32, 11_008, 4_096, False),
    "llama2-13b": _shape(32_000, 5_120, 40, 40, 40, 13_824, 4_096, False),
    "llama2-70b": _shape(32_000, 8_192, 80, 64, 8, 28_672, 4_096, False),
}


def _flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    above: float | None = None,
    least: float | None = None,
) -> Any:
    """Return a dataclass field with its help text and the bounds of its value."""
    return field(default=default, metadata={"help": help, "choices": choices, "above": above, "least": least})


_MINUTES = re.compile(r"(\d{1,6}(?:\.\d+)?)m")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training. Every field is a flag of `finetune` and `pretrain` (`--grad-accum` for `grad_accum`).

    One of `steps` and `epochs` sets the length of the run (`train.Plan` refuses both, and neither). Raises InputError
    for a value out of bounds.
    """

    steps: int | None = _flag(None, "number of optimizer steps (instead of --epochs)", least=1)
    epochs: float | None = _flag(None, "number of passes over the training data (instead of --steps)", above=0)
    batch_size: int = _flag(
        32, "size of a micro-batch: pairs (finetune), or rows of --max-length tokens (pretrain)", least=1
    )
    grad_accum: int = _flag(1, "number of micro-batches whose gradients are summed for an optimizer step", least=1)
    lr: float = _flag(5e-4, "highest learning rate of the schedule", above=0)
    min_lr: float = _flag(0.0, "learning rate at the end of the schedule, as a fraction of --lr", least=0)
    warmup: int = _flag(0, "number of steps in which the learning rate rises to --lr", least=0)
    warmup_ratio: float | None = _flag(None, "the same as a share of the run's steps (instead of --warmup)", least=0)
    schedule: str = _flag("cosine", "shape of the learning rate's fall after the warm-up", choices=SCHEDULES)
    max_length: int = _flag(256, "number of tokens in a row; longer pairs are cut, and pages fill rows", least=2)
    weight_decay: float = _flag(0.0, "AdamW's decoupled weight decay, for matrices only", least=0)
    beta1: float = _flag(0.9, "AdamW's decay rate for the running mean of the gradient", least=0)
    beta2: float = _flag(0.95, "AdamW's decay rate for the running mean of the squared gradient", least=0)
    clip: float = _flag(1.0, "largest norm that the gradient of all weights may have; 0 switches clipping off", least=0)
    dtype: str = _flag(
        "auto",
        "data type of the computation, while the weights stay float32; auto is bfloat16 where the hardware has it, "
        "or else float32",
        choices=DTYPES,
    )
    device: str = _flag("auto", "device to train on; auto is a GPU if there is one", choices=DEVICES)
    compile: bool | None = _flag(
        None,
        "compile the model with torch.compile (default: in a long run over pages on a CPU, which it makes faster)",
    )
    parallel: str = _flag(
        "auto",
        "how the processes of torchrun share the weights: in ddp each has all of them, in fsdp a part; auto is ddp",
        choices=PARALLEL,
    )
    checkpoint_activations: bool = _flag(False, "recompute activations in the backward pass: less memory, more time")
    loss_chunk: int = _flag(LOSS_CHUNK, "number of targets whose logits exist at the same time", least=1)
    seed: int = _flag(0, "seed of the data's order, of the held-out split and of random initial weights", least=0)
    pack: bool = _flag(True, "fill a row with several short pairs, none of which sees the others")
    isolate: bool = _flag(False, "keep the pages of a row apart: each has its own attention and its own positions")
    shuffle_buffer: int = _flag(
        10_000, "number of pages from which the next one is drawn; 0 keeps the order of the files", least=0
    )
    workers: int = _flag(
        0, "number of processes that encode text; 0 encodes it between the steps (no result depends on it)", least=0
    )
    strict: bool = _flag(False, "stop at the first unusable record, instead of skipping up to 1 % of them")
    limit: int | None = _flag(None, "number of records of --data to use, the first ones (default: all)", least=1)
    eval_every: int | None = _flag(
        None,
        "number of steps between evaluations on the held-out split (default: a tenth of the run); 0: only before the "
        "first step and after the last",
        least=0,
    )
    patience: int = _flag(
        0, "number of evaluations in a row without a lower validation loss that end the run; 0: never", least=0
    )
    keep_last: bool = _flag(False, "make final/ the model of the last step, not that of the lowest validation loss")
    max_minutes: float | None = _flag(
        None, "end the run after so many minutes of training, as if it had taken its last step", above=0
    )
    save_every: int | str = _flag(
        "10m",
        "time between resumable checkpoints: minutes (10m), or a number of steps; 0: only when the run is interrupted",
    )
    keep: int | None = _flag(
        None,
        "number of resumable checkpoints to keep, the newest ones; 0: all (default: one, until the run is complete)",
        least=0,
    )
    compare: int = _flag(
        300, "number of held-out pairs that both models answer at the end, evenly spaced; 0: no comparison", least=0
    )
    tensorboard: bool = _flag(False, "write the metrics for TensorBoard, too (which needs the tensorboard extra)")
    save_format: str = _flag(
        "auto",
        "format of final/: native, hf (a Hugging Face folder; needs the hf extra), or auto: hf where the model is one",
        choices=SAVE_FORMATS,
    )
    freeze: tuple[str, ...] = _flag(
        (), "parameters that are not trained, by names or patterns such as 'embed_tokens*', 'layers.0.*' or '*norm*'"
    )
    lora_rank: int = _flag(
        0, "rank of the adapters that are trained while the weights are frozen (LoRA); 0: train the weights", least=0
    )
    lora_alpha: float = _flag(16.0, "LoRA: number that, divided by the rank, multiplies an adapter's output", above=0)
    lora_targets: str = _flag("all", "LoRA: matrices that get an adapter, such as q_proj,v_proj, or all of a layer's")
    lora_dropout: float = _flag(0.0, "LoRA: fraction of an adapter's inputs that training sets to 0", least=0)
    template: str = _flag(
        "auto",
        "template that makes text of questions and answers: auto, chat (the model's own), plain, qa, alpaca, llama2, "
        "llama3, or a FILE.txt or FILE.jinja",
    )
    learn: str = _flag("all", "answers of a chat that are learned: all, or only the last one", choices=LEARN)
    rendered: bool = _flag(
        False, "take markers in the data's text as markers: it has been written in a template already"
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, bounds = getattr(self, item.name), item.metadata
            if bounds["choices"] and value not in bounds["choices"]:
                near = did_you_mean(str(value), bounds["choices"])
                raise InputError(f"{item.name} is {value!r}{near}; choose from {', '.join(bounds['choices'])}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(item.name, value, above=bounds["above"], least=bounds["least"])
        check_number("workers", self.workers, below=MOST_WORKERS + 1)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be below 1")
        if self.min_lr > 1:
            raise InputError(f"min_lr is {self.min_lr}; it is a fraction of the highest learning rate, at most 1")
        defaults = {item.name: item.default for item in dataclasses.fields(self) if item.name.startswith("lora_")}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if changed and not self.lora_rank:
            raise InputError(f"{changed[0]} is given, but no lora_rank: all the weights would be trained")
        if isinstance(self.save_every, str):
            minutes = _MINUTES.fullmatch(self.save_every)
            if minutes is None or not float(minutes[1]):
                raise InputError(
                    f"save_every is {self.save_every!r}; it must be a number of steps, or minutes like 10m"
                )
        else:
            check_number("save_every", self.save_every, least=0)
        object.__setattr__(self, "freeze", (self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze))
        if not all(isinstance(pattern, str) for pattern in self.freeze):
            raise InputError(f"freeze is {list(self.freeze)!r}; it must be names or patterns")
        if self.freeze and self.lora_rank:
            raise InputError("--freeze is for weights, and --lora-rank freezes all of them; choose by --lora-targets")
        if self.steps is not None and self.epochs is not None:
            raise InputError("give --steps or --epochs, not both: each sets the length of the run")
        if self.warmup and self.warmup_ratio is not None:
            raise InputError("give --warmup or --warmup-ratio, not both: each sets the length of the warm-up")
        if self.warmup_ratio is not None and self.warmup_ratio > 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio}; it is a share of the run's steps, at most 1")

    @property
    def save_minutes(self) -> float:
        """Return the minutes between two checkpoints; 0 where they are given as steps."""
        return float(self.save_every[:-1]) if isinstance(self.save_every, str) else 0.0

    def replace(self, **changes: Any) -> "TrainConfig":
        """Return a copy with some fields changed; a new value of a field clears the one that it is given instead of."""
        for alternatives in ({"steps": None, "epochs": None}, {"warmup": 0, "warmup_ratio": None}):
            if not changes.keys().isdisjoint(alternatives):
                changes = alternatives | changes
        return dataclasses.replace(self, **changes)

    def warmup_steps(self, total_steps: int) -> int:
        """Return in how many steps of `total_steps` the learning rate rises."""
        return self.warmup if self.warmup_ratio is None else int(self.warmup_ratio * total_steps)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> "TrainConfig":
        """Build settings from the values of a run's `config.json`. Raises InputError for a wrong key or value."""
        freeze = values.get("freeze")
        return build(TrainConfig, {**values, "freeze": tuple(freeze)} if isinstance(freeze, list) else values, where)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**dataclasses.asdict(self), "freeze": list(self.freeze)}


# The defaults of the two jobs. Finetuning: about 1,000 short pairs, each seen 10 times. Pretraining: how the bundled
# base was made.
FINETUNE = TrainConfig(epochs=10, batch_size=32, lr=1e-4, schedule="linear", warmup=10)
PRETRAIN = TrainConfig(steps=1_500, batch_size=32, lr=2e-3, warmup=100, max_length=256, min_lr=0.05, weight_decay=0.1)
# Pretraining that continues from a model: at the rate for random weights it would forget much of what it knows, and at
# a much lower one it learns little of the new pages (Ibrahim et al., arXiv 2403.08763).
CONTINUED = PRETRAIN.replace(lr=PRETRAIN.lr / 10)

# May differ when a run is resumed: they change no weight, or only how long it goes on.
FREE = ("workers", "keep", "strict", "parallel", "save_every", "max_minutes", "compare", "tensorboard")

# What `minift finetune` chooses from the pairs and the model (`runs/defaults.py`), and what may be given instead of it.
CHOSEN: dict[str, tuple[str, ...]] = {
    "lr": (),
    "epochs": ("steps",),
    "batch_size": ("grad_accum",),
    "warmup": ("warmup_ratio",),
    "max_length": (),
}


def not_given(given: Collection[str]) -> set[str]:
    """Return the names of `CHOSEN` that are to be chosen, where the settings named in `given` are given."""
    return {name for name, others in CHOSEN.items() if not {name, *others} & set(given)}
