"""What takes Captum's methods takes ours: NoiseTunnel and the metrics. Give them the target."""

import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max

from attrib_zoo import AblationCAM, GradCAM, LayerCAM, synthetic

model = synthetic.trained("cnn")
images = synthetic.scenes(8, seed=2).inputs
target = model(images).argmax(1)  # the decision on the clean images; None would be asked anew for each noisy copy


def perturb(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    noise = 0.1 * torch.randn_like(inputs)
    return noise, inputs - noise


for method in (GradCAM, LayerCAM, AblationCAM):
    explainer = method(model)
    plain = explainer.attribute(images, target=target)
    smooth = NoiseTunnel(explainer).attribute(images, target=target, nt_samples=8, stdevs=0.1)
    assert isinstance(smooth, torch.Tensor)  # to type checkers it may be a tuple, as in other calls of Captum
    for name, maps in (("plain", plain), ("NoiseTunnel", smooth)):
        torch.manual_seed(0)  # the same perturbations for all
        value = infidelity(model, perturb, images, maps, target=target, n_perturb_samples=20, normalize=True).mean()
        print(f"{method.__name__:12} {name:12} infidelity {value:.4f}")
    print(f"{method.__name__:12} sensitivity  {sensitivity_max(explainer.attribute, images, target=target).mean():.3f}")
