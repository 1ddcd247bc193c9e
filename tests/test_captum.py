"""Captum's own tools take our maps, and where Captum is right it says the same numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
    visualization,
)
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import Tensor, nn

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.testing import bench
from attrib_zoo.visualize import overlay

METHODS = ("GradCAM", "TTAME")
TARGETS = [3, 0, 2]


@functools.cache
def ready(kind, method):
    """A bench in float64 and a method on it, fitted if need be; shared, since no call leaves anything behind."""
    made = bench(kind, dtype=torch.float64)
    if method == "GradCAM":
        return made, GradCAM(made.model)
    return made, TTAME(made.model).fit(made.batches, max_steps=32, show_progress=False)


@pytest.fixture(params=["cnn", "nhwc", "vit"])
def made(request):
    return ready(request.param, "GradCAM")[0]


@pytest.fixture(params=[f"{kind}-{method}" for kind in ("cnn", "nhwc", "vit") for method in METHODS])
def pair(request):
    return ready(*request.param.split("-"))


def close(found, wanted, rtol=1e-9):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


# ---------------------------------------------------------------------- consumers


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel_averages_our_maps_of_its_noisy_copies(pair, kind):
    made, explainer = pair
    samples, target = 4, torch.tensor(TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = NoiseTunnel(explainer).attribute(
            made.inputs,
            nt_type=kind,
            nt_samples=samples,
            stdevs=0.2,
            target=target,
            additional_forward_args=made.gates,
        )
        torch.manual_seed(3)
        noise = torch.normal(0, torch.tensor(0.2).repeat(3 * samples, 3, 32, 32))
    maps = []
    for i in range(3):
        for j in range(samples):
            noisy = made.inputs[i : i + 1] + noise[i * samples + j]
            maps.append(explainer.attribute(noisy, TARGETS[i], made.gates[i : i + 1]))
    maps = torch.cat(maps).view(3, samples, 3, 32, 32)
    mean, square = maps.mean(1), maps.square().mean(1)
    close(found, {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean**2}[kind], 1e-8)
    assert found.any()


def test_sensitivity_max_by_hand(pair):
    made, explainer = pair
    samples = 3
    noise = 0.1 * torch.randn(3 * samples, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = sensitivity_max(
        explainer.attribute,
        made.inputs,
        lambda inputs: inputs + noise,
        n_perturb_samples=samples,
        target=TARGETS,
        additional_forward_args=made.gates,
    )
    for i in range(3):
        given = {"target": TARGETS[i], "additional_forward_args": made.gates[i : i + 1]}
        clean = explainer.attribute(made.inputs[i : i + 1], **given)
        noisy = [
            explainer.attribute(made.inputs[i : i + 1] + n, **given) for n in noise[i * samples : (i + 1) * samples]
        ]
        length = clean.norm() if clean.any() else 1  # a map of zeros, for a class that nothing speaks for
        wanted = max(float((clean - other).norm() / length) for other in noisy)
        assert float(found[i]) == pytest.approx(wanted, rel=1e-8)
        assert wanted > 0


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_by_hand(pair, normalize):
    made, explainer = pair
    samples = 5
    noise = 0.1 * torch.randn(3 * samples, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noisy = infidelity_perturb_func_decorator(explainer.multiplies_by_inputs)(lambda x: x - noise)
    maps = explainer.attribute(made.inputs, target=TARGETS)
    found = infidelity(
        made.model, noisy, made.inputs, maps, target=TARGETS, n_perturb_samples=samples, normalize=normalize
    )
    with torch.no_grad():
        for i in range(3):
            mine = noise[i * samples : (i + 1) * samples]
            image = made.inputs[i : i + 1]
            drop = made.model(image)[0, TARGETS[i]] - made.model(image - mine)[:, TARGETS[i]]
            told = (mine * maps[i]).sum((1, 2, 3))
            if normalize and told.any():
                told = told * (told * drop).mean() / told.square().mean()
            assert float(found[i]) == pytest.approx(float((told - drop).square().mean()), rel=1e-6)


@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map", "original_image", "masked_image", "alpha_scaling"])
def test_visualize_image_attr_draws_our_map(made, method):
    heat = GradCAM(made.model).attribute(made.inputs)
    strongest = int(heat.amax((1, 2, 3)).argmax())
    figure, axis = visualization.visualize_image_attr(
        heat[strongest].permute(1, 2, 0).numpy(),
        made.inputs[strongest].permute(1, 2, 0).sigmoid().numpy(),
        method=method,
        sign="positive",
        outlier_perc=0,
        use_pyplot=False,
    )
    drawn = axis.images[-1].get_array()
    assert drawn.shape[:2] == (32, 32)
    if method == "heat_map":
        channel_sum = heat[strongest].sum(0)
        close(torch.as_tensor(drawn.data), channel_sum / channel_sum.max(), 1e-6)
    figure.clear()


def test_a_zero_map_which_captum_refuses_is_drawn_by_ours(made):
    zero = torch.zeros(3, 32, 32)
    image = made.inputs[0].float().sigmoid()
    with pytest.raises(AssertionError, match="scale factor = 0"):
        visualization.visualize_image_attr(zero.permute(1, 2, 0).numpy(), method="heat_map", use_pyplot=False)
    plain = overlay(image, zero)
    assert torch.isfinite(torch.as_tensor(plain, dtype=torch.float32)).all()


# ---------------------------------------------------------------------- side by side


def test_the_same_call_as_captums_own_methods(pair):
    made, explainer = pair
    pixels = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).view(1, 1, 32, 32)
    for target in (1, TARGETS, torch.tensor(TARGETS), [(t,) for t in TARGETS]):
        call = {"target": target, "additional_forward_args": (made.gates,)}
        theirs = [
            FeatureAblation(made.model).attribute(made.inputs, feature_mask=pixels, **call),
            Saliency(made.model).attribute(made.inputs.clone().requires_grad_(), **call),
        ]
        ours = explainer.attribute(made.inputs, **call)
        for other in theirs:
            assert (ours.shape, ours.dtype, ours.device) == (other.shape, other.dtype, other.device)
        boxed = explainer.attribute((made.inputs,), **call)
        assert isinstance(boxed, tuple)
        close(boxed[0], ours, 0)


class Linear(nn.Module):
    """Linear up to the mean over space: what a patch adds to the score is known exactly."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 4, 4, bias=False, dtype=torch.float64)
        self.head = nn.Linear(6, 5, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, inputs):
        return self.head(self.conv(inputs).mean((2, 3)))


def test_feature_ablation_of_a_linear_net_is_the_signed_grad_cam():
    model = Linear()
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cells = torch.arange(24).view(4, 6).repeat_interleave(4, 0).repeat_interleave(4, 1).view(1, 1, 16, 24)
    drops = FeatureAblation(model).attribute(images, target=TARGETS, feature_mask=cells)[:, :1, ::4, ::4]
    found = GradCAM(model, layers="conv", relu=False, upsample=False).attribute(images, target=TARGETS)
    close(found, drops, 1e-10)
    assert (drops < 0).any()


@pytest.mark.parametrize("layer", ["stages.0", "stages.1", "stages.2"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_grad_cam_is_captums_with_the_papers_relu_and_bilinear_interpolation(layer, size):
    made = bench("cnn", size, torch.float64)
    module = made.model.get_submodule(layer)
    target = torch.tensor(TARGETS)
    small = LayerGradCam(made.model, module).attribute(
        made.inputs, target, additional_forward_args=made.gates, relu_attributions=True
    )
    large = LayerAttribution.interpolate(small, size, "bilinear")
    found = GradCAM(made.model, layers=layer).attribute(made.inputs, target, made.gates)
    close(found, large.detach().expand_as(made.inputs), 1e-13)
    assert found.any()


def test_grad_cam_is_captums_on_a_resnet():
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.resnet18(weights=None, num_classes=7).eval()
        images = torch.randn(2, 3, 64, 96)
    small = LayerGradCam(model, model.layer4).attribute(images, [5, 1], relu_attributions=True)
    large = LayerAttribution.interpolate(small, (64, 96), "bilinear").detach().expand_as(images)
    close(GradCAM(model).attribute(images, [5, 1]), large, 1e-5)
    assert large.any()


class OneConvolution(nn.Module):
    """The model of the numbers that Captum prints for Grad-CAM: all weights one, two thresholds."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.relu1 = nn.ReLU()
        self.fc1 = nn.Linear(8, 4)
        with torch.no_grad():
            self.conv1.weight.fill_(1)
            self.conv1.bias.copy_(torch.tensor([-50.0, -75.0]))
            self.fc1.weight.copy_(torch.tensor([1.0] * 5 + [-1.0] * 3).expand(4, 8))
            self.fc1.bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc1(self.relu1(self.conv1(inputs)).flatten(1)).relu()


@pytest.mark.parametrize(
    ("layer", "printed"), [("conv1", [[11.25, 13.5], [20.25, 22.5]]), ("relu1", [[0.0, 4.0], [28.0, 32.5]])]
)
def test_the_numbers_that_captum_prints(layer, printed):
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    found = GradCAM(OneConvolution(), layers=layer, upsample=False).attribute(ramp, target=0)
    assert found.tolist() == [[printed]]


def test_captum_on_the_same_model_sees_nothing_of_us(pair):
    made, explainer = pair
    saliency, watched = Saliency(made.model), made.inputs.clone().requires_grad_()
    before = saliency.attribute(watched, target=TARGETS)
    explainer.attribute(made.inputs, target=TARGETS)
    with pytest.raises(IndexError, match="5 classes"):
        explainer.attribute(made.inputs, target=5)
    assert torch.equal(saliency.attribute(watched, target=TARGETS), before)


def test_captums_grad_cam_on_channels_last_is_why_we_find_the_layout():
    made = bench("nhwc", (32, 48))
    module = made.model.get_submodule(made.model.explained)
    theirs = LayerGradCam(made.model, module).attribute(made.inputs, 1, relu_attributions=True)
    assert tuple(theirs.shape) == (3, 1, 6, 20)  # width x channels, which enlarges without an error
    ours = GradCAM(made.model, layers=made.model.explained, upsample=False).attribute(made.inputs, 1)
    activation, gradient = tapped(made.model, module, made.inputs, 1)
    wanted = torch.einsum("nhwd,nd->nhw", activation, gradient.mean((1, 2))).relu()
    close(ours[:, 0], wanted, 1e-5)


def tapped(model, module, images, target):
    """Activation and gradient of a module, by a hook and a backward pass."""
    kept = []
    handle = module.register_forward_hook(lambda m, i, out: kept.append(out))
    scores = model(images.clone().requires_grad_())[:, target].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(scores, kept[0])[0]
