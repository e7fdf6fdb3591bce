"""The promise of `kernels/decode.py`: one more token of one text is the model's own forward pass, and its cache's.

The twin is `Llama.hidden` with one token and a `KVCache`, which `way/test_cache_equals_full.py` holds against reading
the whole text.
"""

import pytest
import torch

from minift.cache import KVCache
from minift.config import FINETUNE, LORA_TARGETS
from minift.errors import InputError
from minift.generate import generate
from minift.kernels import choose, fast_decoder, with_kernels
from minift.kernels.decode import NARROW, TRANSPOSING_PAYS, Decoder, _Products, _width
from minift.lora import LoRAConfig
from tests.helpers import adapted_model, random_model, random_tokens
from tests.twins import SHAPES

CPU, DTYPES = torch.device("cpu"), ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("tokens_to_come", [1, 64], ids=["few tokens", "many, so weights are transposed"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_decoder_is_the_models_forward_pass(
    shape: str, tokens_to_come: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Token by token after a prompt, and what it leaves in the cache. (The norms reduce in float32 in all of them.)"""
    model = random_model(dtype, **{"std": 0.2, "tie_word_embeddings": False, **SHAPES[shape]})
    tokens = random_tokens(1, 30)
    ours, theirs = (KVCache(model.config, 1, 30, torch.device("cpu"), dtype) for _ in range(2))
    for cache in (ours, theirs):
        model(tokens[:, :7], cache=cache)
    decoder = Decoder(model, ours, tokens_to_come)
    for position in range(7, 30):
        found = decoder.logits(int(tokens[0, position]))
        expected = model(tokens[:, position : position + 1], cache=theirs)[0, 0]
        assert found.dtype == dtype
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())
        assert ours.length == theirs.length == position + 1
    for found, expected in zip(ours.stored.flatten(0, 1), theirs.stored.flatten(0, 1), strict=True):
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    with pytest.raises(InputError, match="31 tokens do not fit a cache of 30"):
        decoder.logits(1)


@pytest.mark.parametrize(
    "rows", [(1,), (37,), (64,), (96, 32, 32), (768, 768), (2 * 3 * 5, 7 * 11), (2 * 3 * 5 * 7 * 11,)], ids=str
)
@pytest.mark.parametrize("columns", [1, 6, 24, 576])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-15), (torch.bfloat16, 2**-8)], ids=str)
@torch.inference_mode()
def test_a_product_from_a_transposed_copy(
    rows: tuple[int, ...], columns: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each of two layers, in any order: against float64, and as `torch.mv` rounds it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    generator = torch.Generator().manual_seed(0)
    layers = [[torch.randn(n, columns, generator=generator).to(dtype) for n in rows] for _ in range(2)]
    products, plain = _Products(layers, transpose=True), _Products(layers, transpose=False)
    assert products.transposed == (rows not in ((1,), (2 * 3 * 5, 7 * 11)))  # not in parts of one row
    assert not plain.transposed
    for i in (0, 1, 1, 0):
        x = torch.randn(columns, generator=generator).to(dtype)
        expected = torch.cat([matrix.double() @ x.double() for matrix in layers[i]])
        for these in (products, plain):
            these.x.copy_(x)
            found = these(i)
            assert found.shape == these.shape
            assert float((found.flatten().double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("cpu", ["AVX2", "AVX512", "DEFAULT"])
def test_which_products_are_transposed(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of narrow matrices, which bounds the copy; float32 only where that was measured, on x86."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    for dtype, columns, transposed in [
        (torch.float64, 64, False),
        (torch.float32, 64, cpu != "DEFAULT"),
        (torch.float32, NARROW - 4, cpu != "DEFAULT"),
        (torch.float32, NARROW, False),
        (torch.bfloat16, 64, True),
        (torch.bfloat16, NARROW - 4, True),
        (torch.bfloat16, NARROW, False),
    ]:
        assert _Products([[torch.zeros(64, columns, dtype=dtype)]], True).transposed == transposed


@pytest.mark.parametrize("columns", [64, NARROW])
def test_a_product_in_float32_is_the_work_of_all_threads(columns: int) -> None:
    """`torch.mv` gives it to one: of narrow matrices the parts of the table are shared, of others blocks of rows."""
    for transpose in (True, False):
        products = _Products([[torch.zeros(192, columns), torch.zeros(64, columns)]], transpose)
        if products.transposed:
            assert len(products.starts) >= 2
        else:
            assert [len(vector) for vector, _, _ in products.products[0]] == [6, 2]


@pytest.mark.parametrize(
    ("sizes", "threads", "cpu", "width"),
    [
        ((576, 192, 192), 2, "AVX512", 96),  # 5 + 5 parts; of 192 it would be 3 + 2, and one thread would wait
        ((1536, 1536), 2, "AVX512", 384),
        ((1536, 1536), 2, "AVX2", 96),  # half as many registers, of half as many numbers
        ((576,), 2, "AVX512", 288),
        ((576,), 2, "AVX2", 96),
        ((576,), 1, "AVX512", 288),  # 576 sums do not stay in registers
        ((576,), 16, "AVX512", 36),
        ((49152,), 16, "DEFAULT", 384),
        ((769,), 2, "AVX512", 769),  # a prime
        ((769,), 2, "AVX2", 769),
        ((30, 77), 2, "AVX512", None),
    ],
    ids=str,
)
def test_how_wide_a_part_is(
    sizes: tuple[int, ...], threads: int, cpu: str, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The busiest thread has as little as it can, in parts as wide as they can be."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    assert _width(sizes) == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_prompt_is_decoded_without_the_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first pass; in company the model reads all new tokens together."""
    model = random_model(dtype, std=0.4)
    seen: list[tuple[int, ...]] = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, *more: (seen.append(tuple(tokens.shape)), hidden(tokens, *more))[1]
    )
    generate(model, [[1, 5, 9]], 4)
    assert seen == [(1, 3)]
    seen.clear()
    generate(model, [[1, 5, 9], [1, 7, 8]], 3)
    assert seen == [(2, 3), (2, 1), (2, 1)]


@pytest.mark.parametrize("dtype", TRANSPOSING_PAYS, ids=str)
@pytest.mark.parametrize("more", [-1, 0])
def test_weights_are_copied_where_many_tokens_are_to_come(
    dtype: torch.dtype, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = random_model(dtype, hidden_size=64, intermediate_size=64)
    decoder = Decoder(model, KVCache(model.config, 1, 8, model.device, dtype), TRANSPOSING_PAYS[dtype] + more)
    products = (decoder.query_key_value, decoder.output, decoder.gate_up, decoder.down)
    assert [one.transposed for one in products] == [more == 0] * 4


@pytest.mark.parametrize("names", [(), *(choose(FINETUNE.replace(dtype=dtype), CPU) for dtype in DTYPES)], ids=str)
@torch.no_grad()
def test_it_is_the_same_for_a_model_with_kernels(names: tuple[str, ...]) -> None:
    """To the bit: it reads the weights alone."""
    model, tokens = random_model(std=0.2), random_tokens(1, 12)
    found = []
    for one in (model, with_kernels(model, names)):
        decoder = Decoder(one, KVCache(one.config, 1, 12, CPU, torch.float32), 12)
        found.append(torch.stack([decoder.logits(int(token)) for token in tokens[0]]))
    assert torch.equal(*found)
    expected = model(tokens)[0]
    assert float((found[0] - expected).norm()) <= 1e-5 * float(expected.norm())


@torch.no_grad()
def test_adapters_are_part_of_the_weights_it_reads() -> None:
    everywhere = LoRAConfig(rank=3, alpha=6.0, targets=LORA_TARGETS)
    model, tokens = adapted_model(everywhere, torch.float32).eval(), random_tokens(1, 12)
    decoder = Decoder(model, KVCache(model.config, 1, 12, CPU, torch.float32), 12)
    found = torch.stack([decoder.logits(int(token)) for token in tokens[0]])
    expected = model(tokens)[0]
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    for name, adapter in model.named_parameters():
        if name.endswith("lora_B"):  # without any one of them, it would say something else
            without = adapter.clone()
            adapter.zero_()
            assert float((found - model(tokens)[0]).norm()) > 1e-3 * float(expected.norm()), name
            adapter.copy_(without)


@pytest.mark.parametrize("texts", [1, 2])
@torch.no_grad()
def test_a_cpu_has_it_for_one_text(texts: int) -> None:
    """As `generate` asks for it: a function from the last ids to the logits. Several texts have none."""
    model, tokens = random_model(std=0.2), random_tokens(texts, 6)
    cache = KVCache(model.config, texts, 8, CPU, torch.float32)
    model(tokens[:, :5], cache=cache)
    place = torch.zeros(texts, 1, dtype=torch.int64)
    decode = fast_decoder(model, cache, place + 5, place, 2)
    assert (decode is None) == (texts == 2)
    if decode is not None:
        logits = decode(tokens[:, 5:])
        assert logits.shape == (1, 97)
        assert float((logits - model(tokens)[:, -1]).abs().max()) < 1e-4
