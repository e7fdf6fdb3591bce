"""Train over given batches and ask questions afterwards: what the lessons that train share."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from minift.config import TrainConfig
from minift.data.batches import PageBatches, PairBatches
from minift.data.examples import encode_conversations
from minift.data.templates import template_named
from minift.evaluation.evaluate import answer_questions, make_questions
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import Batch
from minift.prompts import Conversation
from minift.runs.machine import choose_device, choose_dtype
from minift.runs.start import start_state
from minift.tokenizer.base import Tokenizer
from minift.train import train_step


def settings(defaults: TrainConfig, seed: int, **changes: Any) -> TrainConfig:
    """Return a run's settings on a CPU, in the dtype that minift chooses there."""
    config = defaults.replace(device="cpu", seed=seed, compile=False, **changes)
    return config.replace(dtype=choose_dtype(config, choose_device(config)))


def train_on(
    model: Llama, batches: PairBatches | PageBatches, windows: Sequence[Batch], config: TrainConfig
) -> list[float]:
    """Take a step for each batch, with a warm-up of at most a tenth of them. Return the losses."""
    config = config.replace(warmup=min(config.warmup, len(windows) // 10))
    state = start_state(model, batches, config)
    return [
        train_step(state, [window], learning_rate(step, len(windows), config), config).loss
        for step, window in enumerate(windows)
    ]


def finetune(model: Llama, tokenizer: Tokenizer, pairs: Sequence[Conversation], config: TrainConfig, steps: int) -> int:
    """Take `steps` steps over the pairs, epoch after epoch. Return the number of targets trained on."""
    examples, _ = encode_conversations(pairs, template_named("plain"), tokenizer, config.max_length)
    batches = PairBatches(examples, config.batch_size, tokenizer.eos_id, config.seed)
    windows = list(islice(batches, steps))
    train_on(model, batches, windows, config)
    return sum(window.n_targets for window in windows)


def right_answers(model: Llama, tokenizer: Tokenizer, pairs: Sequence[Conversation]) -> list[float]:
    """Ask each question. Return 1 for an answer that is right to the letter, or 0."""
    questions, _ = make_questions(pairs, template_named("plain"), tokenizer, model.config.max_position_embeddings - 1)
    answers = answer_questions(model, tokenizer, questions)
    return [float(answer.text.strip() == q.pair.answer) for q, answer in zip(questions, answers, strict=True)]
