"""A method of your own in a few lines, in your own file, and the proof that it keeps the contract."""

import torch

from attrib_zoo.methods import Attribution, TargetQuery, run
from attrib_zoo.testing import check_attribution


class FeatureNorm(Attribution):
    """Where the features of a layer are large, whatever the class: their norm over the channels."""

    class_agnostic = True  # so the contract does not ask for different maps of different classes

    def compute_maps(self, inputs: torch.Tensor, query: TargetQuery, args: tuple, show_progress: bool) -> torch.Tensor:
        outputs, (features,) = run(self.model, inputs, args, self.taps(inputs, args))  # (N, C, h, w)
        target = query.resolve(outputs)  # checks what the caller asked for
        return features.norm(dim=1, keepdim=True).expand(-1, target.count, -1, -1)  # (N, T, h, w)


report = check_attribution(FeatureNorm)
print(f"{list(report.values()).count('passed')} checks passed, on CNNs and ViTs, NCHW, NHWC and tokens")
