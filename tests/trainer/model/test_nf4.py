"""NF4: the published levels and blocks, and a linear layer that computes as its widened weight does."""

import pytest
import torch

from medtrain.trainer.model.nf4 import BLOCK, LEVELS, NF4Linear, dequantize, quantize

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_becomes_the_nearest_level_times_its_blocks_largest(dtype):
    weight = torch.randn(5, 3 * BLOCK, generator=torch.Generator().manual_seed(0))
    weight[2, BLOCK : 2 * BLOCK] = 0
    back = dequantize(quantize(weight, dtype), torch.float32)
    scales = weight.view(5, 3, BLOCK).abs().amax(-1, keepdim=True)
    candidates = torch.tensor(LEVELS) * scales.unsqueeze(-1)  # [5, 3, 1, 16]
    best = (weight.view(5, 3, BLOCK, 1) - candidates).abs().amin(-1)
    torch.testing.assert_close((back.view(5, 3, BLOCK) - weight.view(5, 3, BLOCK)).abs(), best, rtol=0, atol=1e-7)
    assert torch.equal(dequantize(quantize(back, dtype), torch.float32), back)


def test_the_levels_are_halfway_quantiles_of_the_normal_distribution():
    # QLoRA, appendix E: 8 positive and 7 negative quantiles from 0.9677083 on, a zero between, scaled to 1.
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    up = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([up, torch.zeros(1), down]).sort().values / up.max()
    torch.testing.assert_close(torch.tensor(LEVELS), levels, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_quantized_by_itself_and_takes_nine_bits_in_sixteen(dtype):
    weight = torch.randn(7, 2 * BLOCK, generator=torch.Generator().manual_seed(1))
    whole = quantize(weight, dtype)
    assert torch.equal(
        torch.cat([quantize(weight[:3], dtype), quantize(weight[3:], dtype)]).view(torch.uint8), whole.view(torch.uint8)
    )
    assert whole.dtype == dtype and whole.untyped_storage().nbytes() == 0.5625 * weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward_are_those_of_the_widened_weight(dtype, bias):
    torch.manual_seed(0)
    dense = torch.nn.Linear(2 * BLOCK, 6, bias=bias, dtype=dtype).requires_grad_(False)
    layer = NF4Linear(dense)
    layer.packed.data = quantize(dense.weight, dtype)
    dense.weight.data = dequantize(layer.packed, dtype)
    a = torch.randn(2, 3, 2 * BLOCK, dtype=dtype, requires_grad=True)
    b = a.detach().clone().requires_grad_(True)
    ours, theirs = layer(a), dense(b)
    gradient = torch.randn_like(ours)
    ours.backward(gradient)
    theirs.backward(gradient)
    assert torch.equal(ours, theirs) and torch.equal(a.grad, b.grad) and layer.packed.grad is None


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize(torch.zeros(2, 65), torch.float32)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((2, 64), float("nan")), torch.float32)
