"""The shape of a model: a frozen dataclass, read from JSON and written as JSON. `config.py` has a run's settings.

An unknown key is refused by its name, and a missing one is never guessed.

    python -c "from minift import LlamaConfig; print(LlamaConfig.preset('stories15m').to_json())"

Read next: `config.py`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.errors import InputError, did_you_mean
from minift.values import build, check_number, read_json

if TYPE_CHECKING:
    from torch import Tensor


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
