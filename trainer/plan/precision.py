"""What precision and optimizer settings take: bytes of a weight as kept, Adam's moments, temporaries of the update and of FP8.

Sizes are numbers of elements of this rank unless said otherwise, results bytes. Read off trainer/train/optimizer.py and torchao's
float8 (0.17, 0.18), and held against measurements on a CPU, where FP8 is emulated; docs/plan.md says what that leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from medtrain.trainer.config.settings import Config
from medtrain.trainer.model.lora import linear_shapes
from medtrain.trainer.model.precision import MOMENT_BLOCK as BLOCK
from medtrain.trainer.model.precision import MULTIPLE

MASTER = 4  # of a float32 weight or moment, and of what FSDP reduces (trainer/model/fsdp.py)

# Of the update of one matrix, bytes an element. As written, operation by operation (the CPU): by the profiler. Compiled (CUDA):
# by the profiler too, of the same functions compiled for the CPU, which keep nothing but 8-bit moments widened to float32.
_EAGER = {(False, 4): 16, (False, 2): 44, (True, 4): 49, (True, 2): 56}
_COMPILED = {False: 0, True: 8}

# A cast to FP8: scaled and clamped in float32, one after the other, and the codes.
_CAST = 4 + 4 + 1


def weight_item(config: Config) -> int:
    """Bytes of a trained weight of the model as it is kept, and of its gradient: FSDP reduces in float32, and rounds the
    result to the weight's dtype before it is kept or added."""
    return 2 if config.precision.weights == "bf16" else MASTER


def moment_bytes(config: Config, shape: tuple[int, ...]) -> int:
    """Both moments of a share of this shape."""
    count = math.prod(shape)
    if not _in_8_bits(config, shape):
        return 2 * MASTER * count
    return 2 * (count + count // BLOCK * 4)


def update_bytes(config: Config, shape: tuple[int, ...], item: int, device: str) -> int:
    """The most that the update of a share of this shape takes for a moment; ``item``: bytes of a weight."""
    if config.optim.state == "fp32" and config.precision.weights == "fp32":
        return 0  # torch's own, fused
    eight_bit = _in_8_bits(config, shape)
    return math.prod(shape) * (_COMPILED[eight_bit] if device == "cuda" else _EAGER[eight_bit, item])


def _in_8_bits(config: Config, shape: tuple[int, ...]) -> bool:
    return config.optim.state == "8bit" and len(shape) == 2 and shape[1] % BLOCK == 0


def fp8_names(config: Config, shapes: dict[str, tuple[int, ...]]) -> frozenset[str]:
    """Weights that compute in FP8 (as precision.plan_fp8 chooses them, whatever this machine has)."""
    if config.precision.fp8 == "none":
        return frozenset()
    return frozenset(n for n, shape in linear_shapes(shapes).items() if not any(size % MULTIPLE for size in shape))


@dataclass(frozen=True)
class Fp8Products:
    """Temporaries of the three products of a torchao FP8 layer, eager (compiled, casts are fused and take less).

    What autograd keeps is what it keeps without FP8: the input and the weight in the compute precision. ``item``: bytes of
    that; ``gathered``: whether weights come in FP8; ``emulated``: products of numbers widened to float32.
    """

    item: int
    gathered: bool
    emulated: bool

    def forward(self, inputs: int, weight: int, outputs: int) -> int:
        """The most during y = x W', y included; sizes of x, W and y."""
        cast_weight = 0 if self.gathered else weight
        return max(_CAST * inputs, inputs + _CAST * cast_weight, inputs + cast_weight + self._product(inputs, weight, outputs))

    def backward(self, inputs: int, weight: int, outputs: int) -> int:
        """The most while dx and dW are made of dy, both included, dy not."""
        cast_weight = 0 if self.gathered else weight
        dx, held = self.item * inputs, outputs + cast_weight
        return max(
            outputs + _CAST * cast_weight,
            held + self._product(outputs, weight, inputs),
            # For dW, dy and x are cast anew while the casts for dx live on.
            dx + held + _CAST * outputs,
            dx + held + outputs + _CAST * inputs,
            dx + held + outputs + inputs + self._product(outputs, inputs, weight),
        )

    def _product(self, left: int, right: int, result: int) -> int:
        """Of one product, the result included: copies of both sides (pad_inner_dim), and one more to turn a side around."""
        copies, rounded = left + right, self.item * result
        if not self.emulated:
            return max(copies + max(left, right), copies + rounded)
        wide = 4 * (left + right)
        return copies + max(wide + 4 * right, wide + 4 * result, 4 * result + (rounded if self.item < 4 else 0))
