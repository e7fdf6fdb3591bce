"""Open the model of a run: of any format, its files checked, with adapters if asked for; or make one of random weights.

In a sharded run (fsdp) a model is first made on "meta", without memory. When it is split over the ranks, `fill_shards`
and `fill` read into each rank its part of the weights.
"""

import torch

from minift.checkpoint import load_model, model_without_memory, weights_of
from minift.config import LlamaConfig, TrainConfig
from minift.distributed.sharding import fill
from minift.distributed.world import World
from minift.errors import InputError
from minift.formats.open import check_model_files
from minift.formats.shapes import model_without_weights
from minift.lora import LoRAConfig, add_lora, init_adapters
from minift.model import Llama
from minift.runs.freeze import freeze
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import check_fit


def open_model(name: str, tokenizer: Tokenizer, config: TrainConfig, world: World) -> Llama:
    """Return a model, with new adapters if `config.lora_rank` asks for them; `config.freeze` leaves parts as they are.

    In a sharded run (fsdp) the model is on "meta", without memory: `fill_shards` reads the weights.

    Raises:
        InputError: when its files are missing or damaged, or do not fit together, or it has no parameter to freeze or
            to train.
    """
    _check_files(name, world)
    model = (
        model_without_memory(name) if world.parallel == "fsdp" else load_model(name, device=world.device, check=False)
    )
    check_fit(model.config, tokenizer)
    if config.lora_rank:
        adapters = LoRAConfig.of(config)
        _check_rank(adapters, model)
        add_lora(model, adapters, torch.Generator().manual_seed(config.seed))
    freeze(model, config.freeze)
    return model


def _check_rank(adapters: LoRAConfig, model: Llama) -> None:
    """Raise InputError for a rank that no change of the adapted matrices can have."""
    parameters = model.named_parameters()
    most = max(min(weight.shape) for name, weight in parameters if name.split(".")[-2] in adapters.targets)
    if adapters.rank > most:
        raise InputError(
            f"lora_rank is {adapters.rank:,}; no matrix that gets an adapter has a change of a rank above {most:,}, "
            "the smaller one of its two sizes; lower it"
        )


def random_model(shape: LlamaConfig, config: TrainConfig, world: World) -> Llama:
    """Return a model with random weights; in a sharded run (fsdp) one on "meta", without memory."""
    sharded = world.parallel == "fsdp"
    model = model_without_weights(shape) if sharded else Llama(shape)
    if not sharded:
        model.init_weights(torch.Generator().manual_seed(config.seed))
        model = model.to(world.device)
    freeze(model, config.freeze)
    return model


def fill_shards(name: str, model: Llama, config: TrainConfig, world: World) -> None:
    """Read this rank's part of the weights, and draw that of new adapters."""
    fill(model, world, weights_of(name))
    if config.lora_rank:
        init_adapters(model, torch.Generator().manual_seed(config.seed))


def _check_files(name: str, world: World) -> None:
    """Compare a model's files with their checksums before hours of training; the main rank does it for all."""
    failure = None
    if world.is_main:
        try:
            check_model_files(name)
        except InputError as error:
            failure = error
    world.agree(failure)
