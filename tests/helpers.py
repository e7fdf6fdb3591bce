"""What several tests share."""

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.__main__ import BENCHMARKS
from benchmarks.samples import Sample, Samples
from minift.config import LlamaConfig, TrainConfig
from minift.data.batches import PairBatches
from minift.formats.convert import convert
from minift.lora import LoRAConfig, adapter_weights, add_lora
from minift.model import Llama
from minift.pack import Example, encode_conversation
from minift.prompts import Conversation, Template
from minift.runs.start import start_state
from minift.tokenizer.base import Tokenizer
from minift.train import TrainState, train_step

TEXTS = [
    "What is the capital of Mexico?",
    "",
    " ",
    "   three spaces in front",
    "two spaces behind  ",
    "many     spaces   inside",
    "\n",
    "\nbegins with a line break",
    "ends with line breaks\n\n\n",
    " \n \n mixed \t tabs\tand\r\nother breaks \x0b\x0c",
    "control \x00\x01\x07\x1b\x7f characters",
    "é ≠ e\u0301: no normalisation; ﬁ, ², Å, \u00a0, \u200b, \u2028, \ufeff stay",
    "Ελληνικά, кириллица, 中文字符, 日本語のテキスト, 한국어, العربية, עברית, हिन्दी, ไทย, አማርኛ",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and \U0001d518\U0001d52b \U0010ffff",
    "def f(x):\n    if x < 2:\n\t\treturn {'a': [1, 2.50, -3e10]}  # comment\n",
    "<s> is not BOS, </s> is not EOS, <unk> and <0x0A> are text",
    "1234567890 and 3.14159",
    "### Question:\nWhat?\n\n### Answer:",
]


PACKINGS = ["", ".gz", ".zst"]


ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
# What runs import, which is most of a short one's time: tests that fork many of them import it once, where it is there.
IMPORTED_BY_RUNS = (
    "torch._dynamo",
    "torch.utils.checkpoint",
    "sentencepiece",
    "minift.runs.finetune",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.2, **changes: object) -> Llama:
    """A random model of a few thousand weights; a large `std` makes its logits far from uniform."""
    model = Llama(LlamaConfig(**{**SMALL, "initializer_range": std, **changes}))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(dtype)


def adapted_model(
    config: LoRAConfig | None = None, dtype: torch.dtype = torch.float64, begun: bool = True, **shape: object
) -> Llama:
    """A small model with adapters; with B away from zero, as after some training, if it has `begun`."""
    model = small_model(dtype=dtype, **shape)
    generator = torch.Generator().manual_seed(1)
    add_lora(model, config or LORA, generator)
    if begun:
        for name, tensor in adapter_weights(model).items():
            if name.endswith("lora_B"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def random_model(dtype: torch.dtype = torch.float32, std: float = 0.2, **changes: object) -> Llama:
    """A model whose norms are random too: at their initial 1 they would hide a missing multiplication."""
    model = small_model(dtype=dtype, std=std, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def random_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def to_transformers(model: Llama, attention: str = "sdpa") -> Any:
    """The same model as `transformers` has it, in the same dtype. Without the package, the test is skipped."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            attn_implementation=attention,
        )
    )
    twin = twin.to(model.embed_tokens.weight.dtype).eval()
    weights = {hf_name(name): parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = twin.load_state_dict(weights, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == config.tie_word_embeddings
    return twin


def pack(data: bytes, suffix: str) -> bytes:
    """The bytes of a file with this suffix that holds `data`."""
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)  # most tests need no .zst
    return gzip.compress(data) if suffix == ".gz" else data


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write records (or lines, where they are bytes) as JSON Lines, compressed if the name says so."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(pack(b"".join(line + b"\n" for line in lines), path.suffix))
    return path


def run_here(name: str, tmp_path: Path, *words: object) -> dict[str, Any]:
    """What a benchmark writes, run in this process: a fresh one for each part takes its time. It can be read again."""
    parser = argparse.ArgumentParser()
    BENCHMARKS[name].add_arguments(parser)
    out = tmp_path / "result.json"
    BENCHMARKS[name].run(parser.parse_args([*map(str, words), "--json", str(out)]))
    return record.read(out)


def as_samples(seconds: Mapping[str, Sequence[float]], caches: str = "warm") -> dict[str, Samples]:
    """Samples as `timing.in_turns` returns them: of one call each, none of which is left out."""
    return {
        name: Samples(
            name, "wall", caches, tuple(Sample(0.0, one, 1, turn) for turn, one in enumerate(times)), "repeats", 0.0
        )
        for name, times in seconds.items()
    }


def noise(count: int) -> list[str]:
    """Random strings from all of Unicode, without lone surrogates and without SentencePiece's own mark for a space."""
    rng = random.Random(1)
    texts = []
    for _ in range(count):
        pools = ((1, 128), (1, 0xD800), (0xE000, 0x110000), (32, 33), (10, 11))
        chosen = rng.choices(pools, weights=(8, 4, 2, 4, 2), k=rng.randrange(1, 40))
        texts.append("".join(chr(rng.randrange(*pool)) for pool in chosen).replace("\u2581", "_"))
    return texts


def plain_nll(model: Llama, ids: list[int], first_target: int) -> float:
    """−Σ log p(id | the ids before it), from the full logits of one text, id by id."""
    logits = model(torch.tensor([ids]))[0].double()
    nll = 0.0
    for t in range(first_target, len(ids)):
        shifted = logits[t - 1] - logits[t - 1].max()
        nll -= float(shifted[ids[t]] - torch.log(torch.exp(shifted).sum()))
    return nll


def bits(model: Llama) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def new_state(seed: int = 0) -> TrainState:
    examples = [Example([1, 5, 6 + i], [20 + i, 30 + i, 2]) for i in range(12)]
    config = TrainConfig(steps=9, dtype="float32", batch_size=4)
    return start_state(small_model(seed=seed), PairBatches(examples, 4, pad_id=2, seed=0), config)


def take_steps(state: TrainState, count: int) -> None:
    batches = iter(state.batches)
    for _ in range(count):
        train_step(state, [next(batches), next(batches)], 1e-2, TrainConfig(steps=9, dtype="float32"))
        state.step += 1


def make_examples(answer_lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """One example for each length, with a prompt of 1 to 6 ids. Example i begins with id 3 + i, nothing else does."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(50, 97, (n,), generator=generator).tolist()

    return [Example([3 + i, *ids(i * 5 % 6)], ids(length)) for i, length in enumerate(answer_lengths)]


def texts_of(template: Template, conversation: Conversation) -> tuple[str, str]:
    """Return what a template gives of a conversation with one answer, and what it lets the model learn."""
    (spans,) = template.examples(conversation)
    given, learned = ("".join(span.text for span in spans if span.learned is flag) for flag in (False, True))
    return given, learned


def encode_pair(pair: Conversation, template: Template, tokenizer: Tokenizer, max_length: int) -> Example | None:
    """Return the example of a record that is one, or None if it has no target."""
    (example,) = encode_conversation(pair, template, tokenizer, max_length)
    return example


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def instruct_model(folder: Path) -> Path:
    """Write the bundled base as a Hugging Face folder with ChatML's two tokens, and their template."""
    convert("bundled", str(folder), "hf")
    load_file, save_file = (getattr(import_module("safetensors.torch"), name) for name in ("load_file", "save_file"))
    described = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "config.json"))
    V = config["vocab_size"]
    names = ("<|im_start|>", "<|im_end|>")
    tokenizer["added_tokens"] += [{"id": V + i, "content": name, **described} for i, name in enumerate(names)]
    config["vocab_size"] = V + len(names)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.shape[0] == V:
            more = torch.randn(len(names), *weight.shape[1:], generator=generator) * weight.std()
            weights[name] = torch.cat([weight, more])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# Processes ------------------------------------------------------------------------------------------------------------


def completed(
    command: Sequence[str | Path], *, timeout: float = 300, check: bool = False, **options: Any
) -> "subprocess.CompletedProcess[Any]":
    """Run a command to its end, without standard input; return what it printed, as text unless `options` say otherwise.

    Raises:
        TimeoutExpired: after `timeout` seconds; the command and all that it has started are killed.
        CalledProcessError: with `check`, for an exit code other than 0.
    """
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [str(word) for word in command]
    with subprocess.Popen(words, start_new_session=True, **(streams | options)) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    done = subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


# Bounds of time -------------------------------------------------------------------------------------------------------

# By the clock, on a busy machine, something may take WAITING times as long as it may compute, and LEAST seconds.
WAITING = 10
LEAST = 30


class HangError(BaseException):
    """A call did not come back in time. No `except Exception` of the code under test takes it for something else."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what computes for more than `seconds`, or takes much longer than that by the clock.

    The seconds are those that this process itself computes: a busy machine makes the clock's longer, and not these.

    A limit around this one is kept: it goes on afterwards with what is left of its time.

    Raises:
        HangError: out of the call, wherever it is then.
        AssertionError: when the call went on after that, and came back.
    """
    rang = []

    def ring(*_: Any) -> None:
        rang.append(True)
        raise HangError(f"not done in {seconds} s")

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, seconds, time.process_time),
        signal.ITIMER_REAL: (signal.SIGALRM, max(WAITING * seconds, LEAST), time.monotonic),
    }
    before = {number: signal.signal(number, ring) for number, _, _ in timers.values()}
    ends = {}  # of the limits around this one
    try:
        for timer, (_, limit, clock) in timers.items():
            if left := signal.setitimer(timer, limit)[0]:
                ends[timer] = clock() + left
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer, end in ends.items():
            signal.setitimer(timer, max(end - timers[timer][2](), 0.001))  # at once, where it has passed
    assert not rang, f"not done in {seconds} s, and the call went on"


@contextmanager
def soon_done(seconds: float) -> Iterator[None]:
    """Fail after a call that has computed for `seconds`, or has taken much longer than that by the clock."""
    computed, clock = time.process_time(), time.monotonic()
    yield
    assert time.process_time() - computed < seconds
    assert time.monotonic() - clock < max(WAITING * seconds, LEAST)
