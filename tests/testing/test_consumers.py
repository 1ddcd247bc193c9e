"""Does the suite notice maps that Captum's tools cannot take?"""

from __future__ import annotations

from contract_samples import SmallCAM
from planted_faults import assert_caught, caught_by, planted_in


@caught_by(finite="all zero: expected finite maps")
class MinMaxOfAConstant(SmallCAM):
    def cam(self, activation, gradient):
        heat = super().cam(activation, gradient) + 1e-6 * activation.sum(1, keepdim=True)
        low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
        return (heat - low) / (high - low)


@caught_by(finite="finite maps", visualization="")
class NotANumberInTheCorner(SmallCAM):
    def finish(self, heat, images):
        out = super().finish(heat, images)
        out[:, :, 0, 0] = float("nan")
        return out


@caught_by(infidelity="differ by")
class GrowsWithTheBatch(SmallCAM):
    def cam(self, activation, gradient):
        return super().cam(activation, gradient) * len(activation)


@planted_in(__name__)
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    assert_caught(cls, name, words)
