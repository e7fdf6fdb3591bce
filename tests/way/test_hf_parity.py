"""minift computes what `transformers` computes, from the same weights, in value and in gradient.

Random weights are copied by name into `transformers.LlamaForCausalLM`, which is used as it comes. Held here, for
multi-head, grouped-query and multi-query attention, tied and untied heads, heads of another width than D / H, another
`rope_theta` and another `rms_norm_eps`:

* the logits are the same within 1e-5 in float32 and 1e-10 in float64;
* so is every parameter's gradient of the mean next-token loss, within 1e-5 of its norm in float32; their loss shifts
  the labels by itself, ours is given the targets, so the shift is checked too;
* packed rows with isolated documents equal theirs under an explicit four-dimensional mask;
* the names are theirs without "model.", and nothing is left over on either side.

The weights are large enough that logits are far from uniform: near zero, everything would agree.
"""

import pytest
import torch

from minift.loss import next_token_loss
from minift.model import RMSNorm
from minift.pack import IGNORE
from tests.helpers import hf_name, random_model, random_tokens, small_model, to_transformers

transformers = pytest.importorskip("transformers")

SHAPES = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 10},
    "rope_theta": {"rope_theta": 500_000.0},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
}
grid = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
heads = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
B, T = 3, 21


@heads
@grid
def test_parameter_names_are_theirs_without_the_prefix(shape: dict[str, object], tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied, **shape)
    ours = {hf_name(name): parameter.shape for name, parameter in model.named_parameters()}
    theirs = {name: parameter.shape for name, parameter in to_transformers(model).named_parameters()}
    assert ours == theirs
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}  # and no buffers


@pytest.mark.parametrize(
    ("dtype", "attention", "tolerance"),
    [(torch.float32, "eager", 1e-5), (torch.float32, "sdpa", 1e-5), (torch.float64, "sdpa", 1e-10)],
    ids=["float32-eager", "float32-sdpa", "float64-sdpa"],  # their eager softmax is float32 in any dtype
)
@heads
@grid
def test_logits(shape: dict[str, object], tied: bool, dtype: torch.dtype, attention: str, tolerance: float) -> None:
    model = random_model(dtype, tie_word_embeddings=tied, **shape)
    tokens = random_tokens(B, T)
    with torch.no_grad():
        ours, theirs = model(tokens), to_transformers(model, attention)(input_ids=tokens).logits
    assert ours.shape == theirs.shape == (B, T, 97)
    assert ours.dtype == theirs.dtype == dtype
    assert float(theirs.std()) > 0.9  # far from zero, or any two models would agree
    assert float((ours - theirs).abs().max()) < tolerance


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@heads
@grid
def test_gradient_of_every_parameter(shape: dict[str, object], tied: bool, attention: str) -> None:
    model = random_model(tie_word_embeddings=tied, **shape)
    twin = to_transformers(model, attention)
    tokens = random_tokens(B, T)

    targets = torch.cat((tokens[:, 1:], torch.full((B, 1), IGNORE)), dim=1)
    loss = next_token_loss(model.hidden(tokens), model.head_weight, targets, chunk=16) / (targets != IGNORE).sum()
    loss.backward()
    their_loss = twin(input_ids=tokens, labels=tokens).loss
    their_loss.backward()

    assert int((targets != IGNORE).sum()) == B * (T - 1)
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-6)
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = theirs[hf_name(name)].grad
        assert parameter.grad is not None
        assert gradient is not None
        assert float(gradient.norm()) > 1e-3, name
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norm_is_theirs_to_the_bit(dtype: torch.dtype) -> None:
    """The reduction is in float32, and the result is cast back *before* the weight multiplies it."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = RMSNorm(24, 1e-5), transformers.models.llama.modeling_llama.LlamaRMSNorm(24, 1e-5)
    weight = (0.5 + torch.rand(24, generator=generator)).to(dtype)
    ours.weight.data = theirs.weight.data = weight
    x = (3 * torch.randn(50, 24, generator=generator)).to(dtype)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_packed_documents_under_an_explicit_mask(dtype: torch.dtype, tolerance: float) -> None:
    model = random_model(dtype)
    document_ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [0] * 20 + [1], [0] * 21])
    positions = torch.stack(
        [torch.cat([torch.arange(int(n)) for n in torch.bincount(row)]) for row in document_ids]
    )  # each document counts from 0
    same = document_ids[:, :, None] == document_ids[:, None, :]
    allowed = same & torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(B, 1, T, T, dtype=dtype).masked_fill(~allowed[:, None], torch.finfo(dtype).min)
    tokens = random_tokens(B, T)
    with torch.no_grad():
        ours = model(tokens, positions, document_ids)
        theirs = to_transformers(model)(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
        plain = model(tokens)
    assert float((ours - theirs).abs().max()) < tolerance
    assert float((ours - plain)[:2].abs().max()) > 0.1  # the mask matters in the rows that hold several documents
    assert torch.allclose(ours[2], plain[2], rtol=0, atol=tolerance)  # and not in the row of one document
