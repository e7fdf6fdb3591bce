"""The settings of a training: a frozen dataclass, read from JSON and written as JSON. A model's shape is in `shape.py`.

Every choice that changes a run's result is in one of these two objects, so a run can be saved, read back, compared and
resumed. A field of `TrainConfig` has its help text and its bounds with it: the flags of the command line
are made of the fields (`cli/train.py`), so a new field here is a new flag there. An unknown key is refused by its name.

    python -c "from minift.config import FINETUNE; print(FINETUNE.to_dict())"

Read next: `prompts.py`.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from minift.errors import InputError, did_you_mean
from minift.shape import PRESETS as PRESETS  # both objects are imported from here
from minift.shape import LlamaConfig as LlamaConfig
from minift.shape import RopeScaling as RopeScaling
from minift.values import build, check_number

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("auto", "ddp", "fsdp")
LEARN = ("all", "last")
SAVE_FORMATS = ("auto", "native", "hf")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = ("cosine", "linear", "constant")
LOSS_CHUNK = 1_024  # targets whose logits exist at the same time: fewer are slower on a CPU, more take more memory
MOST_WORKERS = 256  # processes for encoding; a typing error must not start a million of them


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
