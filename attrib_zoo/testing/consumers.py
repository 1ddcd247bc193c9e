"""Captum's NoiseTunnel, metrics and plots applied to the maps, compared by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import NoiseTunnel
from captum.attr import visualization as captum_plots
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from torch import Tensor

from attrib_zoo.errors import BackboneMismatchError
from attrib_zoo.testing.benches import MODELS
from attrib_zoo.testing.suite import Case, check, expect, same

_PLOTS = ("heat_map", "blended_heat_map", "original_image", "masked_image", "alpha_scaling")


@check("cnn", "vit")
def noise_tunnel(case: Case) -> None:
    """``NoiseTunnel`` without noise returns the plain map; with noise its variance is finite."""
    tunnel, ask, gates = NoiseTunnel(case.explainer), case.explainer.attribute, case.bench.gates
    quiet: dict[str, Any] = {"stdevs": 0.0, "nt_samples": 3, "nt_samples_batch_size": 2}
    for target in (1, [2, 0, 1], torch.tensor([2, 0, 1]), [(2,), (0,), (1,)]):
        same(
            tunnel.attribute(case.inputs, target=target, **quiet),
            ask(case.inputs, target=target),
            f"target={target}",
            1e-4,
        )
    given = {"target": [2, 0, 1], "additional_forward_args": gates}
    wanted = ask(case.inputs, **given)
    same(tunnel.attribute(case.inputs, **given, **quiet), wanted, "with a forward argument", 1e-4)
    boxed = tunnel.attribute((case.inputs,), **given, **quiet)
    expect(isinstance(boxed, tuple) and len(boxed) == 1, "a 1-tuple: expected a 1-tuple")
    same(boxed[0], wanted, "a 1-tuple", 1e-4)
    spread = tunnel.attribute(case.inputs, target=1, nt_type="vargrad", stdevs=0.2, nt_samples=4)
    low = -1e-5 * float(wanted.abs().max()) ** 2
    expect(bool(torch.isfinite(spread).all()) and float(spread.min()) >= low, "vargrad: expected finite values >= 0")


def _noise(like: Tensor, samples: int) -> Tensor:
    """``(N * samples, C, H, W)``: fixed noise; its first rows are the same for every N."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(samples, *like.shape[1:], generator=generator) for _ in range(3)]
    return 0.2 * torch.cat(rows)[: len(like) * samples].to(like)


def _plus(noise: Tensor) -> Callable[[Tensor], Tensor]:
    """A perturbation of one argument; Captum passes a radius to one of two."""
    return lambda inputs: inputs + noise


@check("cnn", "vit")
def sensitivity_max(case: Case) -> None:
    """``captum.metrics.sensitivity_max`` gives what a loop over images and noises gives."""
    ask = case.explainer.attribute
    for images, samples in ((1, 2), (3, 2), (3, 1)):
        inputs, targets = case.inputs[:images], case.targets[:images]
        noise = _noise(inputs, samples)
        found = captum_sensitivity_max(ask, inputs, _plus(noise), n_perturb_samples=samples, target=targets)
        wanted = []
        for i, target in enumerate(targets):
            clean = ask(inputs[i : i + 1], target=target)
            moved = [ask(inputs[i : i + 1] + noise[i * samples + j], target=target) for j in range(samples)]
            wanted.append(max(float((clean - m).norm() / (clean.norm() or 1.0)) for m in moved))
        same(found, torch.tensor(wanted), f"{images} image(s), {samples} sample(s)", 1e-2)


@check("cnn", "vit")
def infidelity(case: Case) -> None:
    """``captum.metrics.infidelity`` takes the maps and gives what its formula gives, image by image."""
    samples = 4
    noise = _noise(case.inputs, samples)
    found = captum_infidelity(
        case.model,
        lambda x: (noise, x - noise),
        case.inputs,
        case.explainer.attribute(case.inputs, target=case.targets),
        target=case.targets,
        n_perturb_samples=samples,
    )
    wanted = []
    with torch.no_grad():
        for i, target in enumerate(case.targets):
            image = case.inputs[i : i + 1]
            heat = case.explainer.attribute(image, target=target)
            rows = noise[i * samples : (i + 1) * samples]
            drop = case.model(image)[0, target] - case.model(image - rows)[:, target]
            wanted.append(((rows * heat).sum((1, 2, 3)) - drop).square().mean())
    same(found, torch.stack(wanted), "against the formula", 1e-3)


@check(*MODELS)
def finite(case: Case) -> None:
    """Maps are finite on zero, constant and huge images, and where a layer is dead or carries no information."""
    extremes = {
        "zero images": torch.zeros_like(case.inputs),
        "constant images": torch.full_like(case.inputs, 0.7),
        "images of 1e4": torch.full_like(case.inputs, 1e4),
        "images of -1e4": torch.full_like(case.inputs, -1e4),
    }
    for what, images in extremes.items():
        found = case.explainer.attribute(images, target=case.targets)
        expect(bool(torch.isfinite(found).all()), f"{what}: expected finite maps")
    layer = f"{case.model.explained}."
    for what, dead in {
        "a layer whose parameters are all zero": (layer,),
        "features that are the same everywhere": ("stem.", "stages.", "patch_embed.", "pos_embed"),
    }.items():
        with torch.no_grad():
            for name, parameter in case.model.named_parameters():
                if name.startswith(dead):
                    parameter.zero_()
        try:
            found = case.explainer.attribute(case.inputs, target=case.targets)
        except BackboneMismatchError:  # fitted for other weights, and says so
            continue
        expect(bool(torch.isfinite(found).all()), f"{what}: expected finite maps")


@check()
def visualization(case: Case) -> None:
    """All five ways of ``captum.attr.visualization.visualize_image_attr`` draw the map."""
    image = (case.inputs[0] - case.inputs[0].min()).div(case.inputs[0].max() - case.inputs[0].min())
    number = int(case.maps.flatten(1).abs().amax(1).argmax())
    heat = case.maps[number]
    expect(bool(heat.any()), "the maps are all zero")
    for method in _PLOTS:
        figure, _ = captum_plots.visualize_image_attr(
            heat.permute(1, 2, 0).numpy(),
            image.permute(1, 2, 0).numpy(),
            method=method,
            sign="absolute_value",
            use_pyplot=False,
        )
        figure.clear()
