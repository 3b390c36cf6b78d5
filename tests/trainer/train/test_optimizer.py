"""AdamW with 8-bit moments and bfloat16 weights: torchao's bits, rounding that is right on average, the same on any rank."""

import pytest
import torch

from medtrain.trainer.model.precision import load_torchao
from medtrain.trainer.train.optimizer import BLOCK, SmallAdamW, stochastically_rounded

pytest.importorskip("torchao", reason="torchao is not installed")
load_torchao("tests")


def small(parameters, *, eight_bit, weight_decay=0.1, seed=0, **options):
    names = {p: str(i) for i, p in enumerate(parameters)}
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8} | options
    return SmallAdamW([{"params": parameters, "weight_decay": weight_decay}], names, eight_bit=eight_bit, seed=seed, **options)


def gradients(shape, steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 10 ** (i % 3 - 2) for i in range(steps)]


def test_eight_bit_moments_are_those_of_torchao():
    from torchao.optim import AdamW8bit

    start = torch.randn(48, 3 * BLOCK, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = small([ours], eight_bit=True)
    b = AdamW8bit([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, block_size=BLOCK)
    for grad in gradients(start.shape, 6):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        with torch.compiler.set_stance("force_eager"):
            b.step()
    # The same to the last bits of float32: where the bias corrections are multiplied is another place.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    same = a.state[ours]["exp_avg"] == b.state[theirs]["exp_avg"].codes
    assert same.float().mean() > 0.9999
    torch.testing.assert_close(a.state[ours]["exp_avg_sq_scale"].view(-1), b.state[theirs]["exp_avg_sq"].scale)
    assert a.state[ours]["exp_avg"].dtype == torch.uint8 and not torch.equal(ours, start)


def test_float32_moments_and_weights_are_torchs_own_adamw():
    start = torch.randn(7, 33)  # rows that no block divides: moments stay in float32 though 8 bits are asked for
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a, b = small([ours], eight_bit=True), torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for grad in gradients(start.shape, 6):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_stochastic_rounding_gives_a_neighbour_and_the_value_on_average():
    values = torch.tensor([1.0, 1.0 + 2**-9, -1.0 - 3 * 2**-10, 3.14159265, 1e-30, -0.0, 65504.3]).repeat(4096, 1)
    rounded = stochastically_rounded(values, torch.tensor(123), 0).float()
    down = (values.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((rounded == down) | (rounded == up)).all()
    assert torch.equal(rounded[:, 0], values[:, 0]) and torch.equal(rounded[:, 5], values[:, 5])  # what bfloat16 has, stays
    share = (rounded == up).float().mean(0)[[1, 2, 3, 4, 6]]
    wanted = ((values.view(torch.int32) & 0xFFFF).float() / 65536)[0][[1, 2, 3, 4, 6]]
    assert wanted.min() > 0.05 and (share - wanted).abs().max() < 4 * 0.5 / 64  # four standard errors
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(stochastically_rounded(odd, torch.tensor(1), 0).float(), odd, equal_nan=True)


def test_noise_depends_on_place_and_key_but_not_on_how_a_weight_is_cut():
    values = torch.rand(6, 50) + 1
    whole = stochastically_rounded(values, torch.tensor(9), 0)
    parts = [stochastically_rounded(values[i : i + 2], torch.tensor(9), i * 50) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, stochastically_rounded(values, torch.tensor(10), 0))
    same = torch.full((6, 50), 1 + 2**-9)
    assert len(stochastically_rounded(same, torch.tensor(9), 0).unique()) == 2
    far = stochastically_rounded(same, torch.tensor(9), 2**33)  # places beyond 32 bits
    assert not torch.equal(far, stochastically_rounded(same, torch.tensor(9), 0))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_updates_too_small_for_bfloat16_count_on_average(eight_bit):
    weight = torch.nn.Parameter(torch.ones(32, BLOCK, dtype=torch.bfloat16))
    optimizer = small([weight], eight_bit=eight_bit, weight_decay=0.0, lr=1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Adam steps by lr against a constant gradient; a neighbour of 1 is 2^-8 away, so that rounding to nearest would stay.
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 100 * 1e-4, abs=2e-4)
    moment = optimizer.state[weight]["exp_avg"]
    assert moment.dtype == (torch.uint8 if eight_bit else torch.float32)
