"""A training step waits for a GPU once, where it reads the gradient's norm and the loss: found without a GPU.

Tensors without numbers show each wait: whatever asks for a number of theirs has none to get. On every machine they are
on the meta device, of which neither the pages nor the kernels know more than that it is no CPU. Where PyTorch is a CUDA
build (no GPU is needed), they are fake ones on a device that is called cuda, and the kernels choose as on a GPU:
wrong devices and dtypes show too. What waits inside PyTorch's own operations, only a GPU shows: the last test.
"""

import linecache
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minift import kernels, optim
from minift.cache import KVCache
from minift.config import LlamaConfig, TrainConfig
from minift.distributed.world import World
from minift.kernels import adamw, cross_entropy, flex, norm
from minift.kernels.graph import GraphDecoder
from minift.loss import ChunkedCrossEntropy
from minift.model import Llama
from minift.pack import Batch, collate
from minift.runs.start import start_state
from minift.train import Objective, TrainState, train_step
from tests.helpers import SMALL, make_examples

SHAPE = LlamaConfig(**{**SMALL, "hidden_size": 64, "max_position_embeddings": 2048})
PACKAGE = Path(kernels.__file__).parent.parent
CPU, META = torch.device("cpu"), torch.device("meta")


class Waits(TorchDispatchMode):
    """Collect the lines of minift that read a number of a tensor without numbers, or copy to a GPU and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        here = args[0].device if args and isinstance(args[0], Tensor) else CPU
        if name == "_local_scalar_dense" and here.type != "cpu":
            self._note()
            return 1.0
        if name == "_to_copy" and (to := torch.device(kwargs.get("device") or here)).type != here.type:
            if to.type == "cpu":
                self._note()
                return torch.ones(args[0].shape, dtype=args[0].dtype)
            if not kwargs.get("non_blocking"):
                self._note()
        return function(*args, **kwargs)

    def _note(self) -> None:
        frame: Any = sys._getframe()
        while frame and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() if frame else "a line of the test"
        if self.lines[-1:] != [line]:  # `tolist` of a fake tensor asks once for each number, of a real one once
            self.lines.append(line)


def micro_batches(length: int = 64) -> list[Batch]:
    """Return two batches of which few positions have a target, and one of which all have."""
    few = collate(make_examples([3, 9, 5, 8, 2, 30]), pad_id=2, length=length)
    assert few.isolated
    assert 0 < few.n_targets < few.targets.numel() / 2
    return [few, few, Batch(few.tokens, few.tokens, few.positions, few.document_ids, False, few.tokens.numel())]


@pytest.mark.parametrize(
    "read",
    [lambda x: int(x.sum()), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: bool((x > 0).any())],
    ids=["int", "tolist", "cpu", "bool"],
)
def test_a_read_is_a_wait(read: Callable[[Tensor], object]) -> None:
    with Waits() as waits:
        read(torch.ones(3, device=META))
    assert len(waits.lines) == 1


def test_numbers_of_a_cpu_and_operations_alone_are_none() -> None:
    with Waits() as waits:
        assert float(torch.ones(3).sum()) == 3
        (torch.ones(3, device=META) * 2).sum()
    assert waits.lines == []


@pytest.mark.parametrize("index", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.masked_select(x > 0)])
def test_a_shape_that_only_the_numbers_tell_is_refused(index: Callable[[Tensor], Tensor]) -> None:
    with Waits(), pytest.raises(Exception, match=r"Meta|meta"):
        index(torch.ones(3, device=META))


@pytest.mark.parametrize("names", [(), kernels.choose(TrainConfig(dtype="bfloat16"), META)], ids=["plain", "kernels"])
def test_a_step_waits_once_on_a_device_that_is_no_cpu(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes and the optimizer, over three micro-batches. (This device knows no autocast, and no fused AdamW.)"""
    monkeypatch.setattr(torch, "autocast", lambda *words, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = Llama(SHAPE).to(META)
    objective = kernels.install(Objective(model), names)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, objective)  # type: ignore[arg-type]
    window = [batch.to(META) for batch in micro_batches()]
    with Waits() as waits:
        result = train_step(state, window, 0.1, TrainConfig(steps=1))
    assert result.stepped
    assert len(waits.lines) == 1
    assert "gathered(norm), total_nll" in waits.lines[0]


# On a device that is called cuda --------------------------------------------------------------------------------------


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Make fake tensors in this context: there may be some on a GPU, and there need be no GPU."""
    fakes = pytest.importorskip("torch._subclasses.fake_tensor")
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is a build without CUDA: it cannot pretend to have a GPU")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *words, **options: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    with fakes.FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)


def fake_model(device: torch.device, dtype: torch.dtype = torch.float32) -> Llama:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Llama(SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_waits_for_cuda_once(dtype: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its backward passes, for which autograd asks the driver. float16's scaler has two or three more."""
    window = micro_batches()
    with pretended_cuda(monkeypatch) as device:
        model = fake_model(device)
        config = TrainConfig(steps=1, dtype=dtype, compile=False)
        state = start_state(model, None, config, World(device=device), plain=plain)  # type: ignore[arg-type]
        losses: list[Tensor] = []

        def backward(loss: Tensor) -> None:
            losses.append(loss)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)

        monkeypatch.setattr(Tensor, "backward", backward)
        with Waits() as waits:
            result = train_step(state, [batch.to(device) for batch in window], 0.1, config)
        assert result.stepped
        assert [(loss.dtype, loss.device, loss.shape) for loss in losses] == [(torch.float32, device, ())] * 3
    scaler = ["scale = scaler.get_scale()", "scaler.step(optimizer)", "stepped = scaler.get_scale() >= scale"]
    if plain:
        scaler.remove("scaler.step(optimizer)")  # PyTorch's AdamW leaves the step out on the GPU
    assert "gathered(norm), total_nll" in waits.lines[0]
    assert [line.split("  #")[0] for line in waits.lines[1:]] == (scaler if dtype == "float16" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_of_documents_are_read_without_a_wait(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention by its definition: a compiler for it would need a GPU, and so would its backward pass."""
    monkeypatch.setattr(flex, "_flex_attention", lambda device: _flex_as_one_operation)
    batches = micro_batches(2 * flex.FLEX_LENGTH)
    with pretended_cuda(monkeypatch) as device, torch.no_grad(), torch.autocast("cuda", dtype, dtype != torch.float32):
        objective = kernels.install(Objective(fake_model(device)), kernels.choose(TrainConfig(compile=False), device))
        with Waits() as waits:
            losses = [objective(batch.to(device)) for batch in batches]
        assert [(loss.dtype, loss.device) for loss in losses] == [(torch.float32, device)] * 3
    assert waits.lines == []


def _flex_as_one_operation(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, enable_gqa: bool) -> Tensor:
    assert query.dtype == key.dtype == value.dtype
    assert block_mask.kv_num_blocks.device == query.device
    assert block_mask.shape[-2:] == (query.shape[2], key.shape[2])
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return torch.empty_like(query)


def test_one_more_token_is_read_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_cuda(monkeypatch) as device, torch.inference_mode():
        model = fake_model(device, torch.bfloat16)
        cache = KVCache(SHAPE, 2, 16, device, torch.bfloat16)
        ids = torch.zeros(2, 9, dtype=torch.int64, device=device)
        documents = torch.zeros_like(ids)
        kernels.with_kernels(model, ("norm", "flex")).hidden(ids, documents, documents, cache)
        decoder = GraphDecoder(model, cache, ids[:, :1], documents[:, :1])
        with Waits() as waits:
            logits = decoder.logits(ids[:, :1])
        assert (logits.shape, logits.dtype, logits.device) == ((2, 97), torch.bfloat16, device)
    assert waits.lines == []


class Context:
    """What autograd gives a function of its own."""

    def __init__(self, *needed: bool):
        self.needs_input_grad = needed

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_passes_that_are_written_out_give_gradients_like_their_inputs(
    low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_cuda(monkeypatch) as device, torch.autocast("cuda", low, low != torch.float32), Waits() as waits:
        x, weight = torch.ones(2, 8, 64, device=device), torch.ones(64, device=device)
        heads, table = torch.ones(2, 4, 8, 16, device=device, dtype=low), torch.ones(2, 1, 8, 16, device=device)
        rows, head = x.flatten(0, 1), torch.ones(97, 64, device=device)
        targets = torch.ones(16, dtype=torch.int64, device=device)
        for function, *inputs in (
            (norm._RMSNorm, x, weight, 1e-5, low),
            (norm._RoPE, heads, table, table),
            (ChunkedCrossEntropy, rows, head, targets, 5),
            (cross_entropy._ChunkedCrossEntropy, rows, head, targets, 5),
        ):
            context = Context(*(isinstance(each, Tensor) and each.is_floating_point() for each in inputs))
            result = function.forward(context, *inputs)
            # `once_differentiable` would ask autograd, which asks the driver.
            gradients = function.backward.__wrapped__(context, torch.ones_like(result))
            assert len(gradients) == len(inputs)
            for gradient, of in zip(gradients, inputs, strict=True):
                assert gradient is None or (gradient.shape, gradient.device) == (of.shape, device)
                assert gradient is None or gradient.dtype == of.dtype, function
    assert waits.lines == []


def test_all_gpu_kernels_have_gone_through_it() -> None:
    """A kernel that a GPU run takes is one of those above; `compiling` sets an option of the compiler."""
    assert set(kernels.choose(TrainConfig(dtype="bfloat16", compile=False), torch.device("cuda"))) == {
        "norm",
        "flex",
        "cross_entropy",
        "targets",
        "adamw",
    }
    assert adamw.make_optimizer is not optim.make_optimizer


@pytest.mark.cuda
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
def test_a_step_waits_for_this_gpu_once(plain: bool) -> None:
    """By PyTorch's own report of the operations that wait, those inside of its operations among them."""
    device = torch.device("cuda")
    config = TrainConfig(steps=9, dtype="bfloat16", compile=False)
    with device:
        model = Llama(SHAPE)
    model.init_weights(torch.Generator(device).manual_seed(0))
    state = start_state(model, None, config, plain=plain)  # type: ignore[arg-type]
    window = [batch.to(device) for batch in micro_batches()]
    train_step(state, window, 1e-3, config)  # loads kernels, makes the optimizer's state
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(state, window, 1e-3, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in caught if "synchronizing CUDA operation" in str(one.message)]) == 1
