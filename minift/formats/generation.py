"""Hugging Face's `generation_config.json`: the ids that end a text, and what else it asks of `generate`.

Chat models keep their stop tokens there; they are used. How a next id is chosen is asked for in minift by flags
(`--temperature`, `--top-p`), greedily without them. So the file's own wishes are not followed, and are reported. The
other keys are about speed, memory and what is returned, and do not change a text.

Source: `GenerationConfig`, in the documentation of `transformers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.values import read_json

GENERATION_FILE = "generation_config.json"

_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Keys that change a text, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "do_sample": (None, False),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}
_NO_DIFFERENCE = {
    "_commit_hash",
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",  # the tokenizer says whether a text begins with it
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",  # of beams
    "is_assistant",
    "length_penalty",  # of beams
    "low_memory",
    "max_cache_len",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
    "use_mtp",
}
GENERATION_KEYS = frozenset({"eos_token_id", *_SAMPLING, *_NEUTRAL, *_NO_DIFFERENCE})  # all that are known


@dataclass(frozen=True)
class Generation:
    """The content of a `generation_config.json`.

    Attributes:
        file: its path.
        ends: the ids that end a text, in addition to those of `config.json`.
        notes: what it asks for that minift does not follow.
    """

    file: Path
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def with_ends(self, config: LlamaConfig, eos_id: int | None = None) -> LlamaConfig:
        """Return a config that has these stop tokens, too. Raises InputError for one outside of its vocabulary.

        Args:
            eos_id: the tokenizer's: models that were trained for chats often end a turn with it, but do not say so.
        """
        named = [eos_id] if eos_id is not None and eos_id < config.vocab_size else []
        merged = tuple(dict.fromkeys([*config.eos_token_ids, *self.ends, *named]))
        if merged == config.eos_token_ids:
            return config
        return LlamaConfig.from_dict({**config.to_dict(), "eos_token_id": list(merged)}, str(self.file))


def read_generation(file: Path) -> Generation:
    """Read a `generation_config.json`, which a folder need not have. Raises InputError for ends that are no ids."""
    if not file.is_file():
        return Generation(file)
    values = read_json(file)
    ends = values.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(not isinstance(id, int) or isinstance(id, bool) for id in ids):
        raise InputError(f"{file}: eos_token_id is {ends!r}; it must be an id or a list of ids")
    return Generation(file, tuple(ids), tuple(_notes(values, file.name)))


def _notes(values: Mapping[str, Any], name: str) -> list[str]:
    """Return a note on the keys that are not followed, and one on those that are not known."""
    asked = {key for key, neutral in _NEUTRAL.items() if key in values and values[key] not in neutral}
    if "do_sample" in asked:  # otherwise these change nothing
        asked |= {key for key in _SAMPLING if values.get(key) is not None}
    notes = []
    if asked:
        keys = ", ".join(sorted(asked))
        notes.append(f"{name} asks for {keys}: minift does not follow it, but its own flags (greedy without them)")
    if unknown := sorted(key for key in set(values) - GENERATION_KEYS if values[key] not in (None, False, [], {})):
        notes.append(f"{name} has keys that minift does not use: {', '.join(unknown)}")
    return notes
