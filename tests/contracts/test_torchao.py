"""What we rely on of torchao: FP8 layers by a recipe's name, on a CPU by emulation, and the codes of 8-bit moments. How
far a curve is from float32 is in tests/trainer/model/test_precision.py."""

import pytest
import torch

from medtrain.trainer.model.precision import load_torchao
from medtrain.trainer.train.optimizer import BLOCK, _code_of_zero, _levels

pytest.importorskip("torchao", reason="torchao is not installed")
load_torchao("tests")


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_layer_by_a_recipes_name_is_near_the_plain_one(recipe):
    import dataclasses

    from torchao.float8 import Float8LinearConfig

    from medtrain.trainer.model.fp8 import FP8Linear

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 32, bias=False), torch.randn(48, 64)
    layer = FP8Linear.from_float(linear, config=config)
    exact, rounded = linear(x).detach(), layer(x).detach()
    assert 1e-3 < float((exact - rounded).norm() / exact.norm()) < 0.06
    layer.plain = True
    assert torch.equal(layer(x), exact)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_moments_stand_for_ascending_levels_and_come_back(signed):
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    levels = _levels(signed, torch.device("cpu"))
    assert len(levels) == 256 and bool((levels.diff() > 0).all()) and float(levels[_code_of_zero(signed)]) == 0.0
    torch.manual_seed(0)
    values = torch.randn(4, BLOCK) if signed else torch.rand(4, BLOCK)
    values[0, :3] = 0.0
    scaled, scales = scale_tensor(values, BLOCK)
    back = dequant_with_qmap(quantize_8bit_with_qmap(scaled, levels), levels, scales.view(-1)).view_as(values)
    assert bool((back[0, :3] == 0).all()) and float((back - values).abs().max()) < 0.03 * float(values.abs().max())
