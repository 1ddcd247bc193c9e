"""Iterated integrated attributions as plain loops over both paths, one image, one pass at a time."""

from __future__ import annotations

import engine_cases as cases
import torch
from oracles import explicit_vit
from torch import Tensor, nn


def gradient_at(model: nn.Module, layer: str, image: Tensor, given: Tensor | None, target: int) -> tuple[Tensor, ...]:
    """What the layer puts out (or is made to), and the gradient of the logit there."""
    held: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        held.append((output if given is None else given).detach().clone().requires_grad_())
        return held[0].clone()

    twin = cases.out_of_place(model)
    handle = twin.get_submodule(layer).register_forward_hook(hook)
    with torch.enable_grad():
        logits = twin(image[None])
        (gradient,) = torch.autograd.grad(logits[0, target], held[0])
    handle.remove()
    return held[0].detach()[0], gradient[0]


def released(model: nn.Module, layer: str, image: Tensor, target: int, n: int) -> Tensor:
    total = 0
    for i in range(n + 1):
        maps, gradient = gradient_at(model, layer, image * i / n, None, target)
        total = total + (gradient * maps.clamp(min=0)).sum(0)
    return total


def double(model: nn.Module, layer: str, image: Tensor, target: int, n: int) -> Tensor:
    total = 0
    for i in range(n + 1):
        point = image * i / n
        maps, _ = gradient_at(model, layer, point, None, target)
        low = torch.stack([channel.min() for channel in maps])[:, None, None].expand_as(maps)
        for j in range(n + 1):
            inner = low + (maps - low) * j / n
            _, gradient = gradient_at(model, layer, point, inner[None], target)
            total = total + (gradient * (inner - low).clamp(min=0)).sum(0)
    return total


def triple(model: nn.Module, earlier: str, later: str, image: Tensor, target: int, n: int) -> Tensor:
    outer = [gradient_at(model, earlier, image * i / n, None, target)[0] for i in range(n + 1)]
    lowest = torch.stack(outer).min(0).values
    total = 0
    for i in range(n + 1):
        for j in range(n + 1):
            middle = lowest + (outer[i] - lowest) * j / n
            held: list[Tensor] = []
            twin = cases.out_of_place(model)
            twin.get_submodule(earlier).register_forward_hook(lambda _, __, ___, middle=middle: middle[None].clone())
            twin.get_submodule(later).register_forward_hook(lambda _, __, out, held=held: held.append(out.clone()))
            with torch.no_grad():
                twin(image[None])
            maps = held[0][0]
            low = torch.stack([channel.min() for channel in maps])[:, None, None].expand_as(maps)
            for k in range(n + 1):
                inner = low + (maps - low) * k / n
                _, gradient = gradient_at(model, later, image, inner[None], target)
                total = total + (gradient * inner.clamp(min=0)).clamp(min=0).sum(0)
    return total


def transformer(model: nn.Module, image: Tensor, target: int, n: int) -> Tensor:
    """The product of all blocks' factors, ``(T, T)``."""
    means: list[Tensor] = []
    for i in range(n + 1):
        for j in range(n + 1):
            last = len(explicit_vit.run(model, image)[1]) - 1

            def hold(number: int, head: int, matrix: Tensor, last: int = last, share: float = j / n) -> Tensor:
                return share * matrix.detach() if number == last else matrix

            matrices, gradients = explicit_vit.with_gradients(model, image * i / n, target, hold)
            found = [explicit_vit.positive_mean(a, g) for a, g in zip(matrices, gradients, strict=True)]
            means = [m + f for m, f in zip(means, found, strict=True)] if means else found
    return explicit_vit.rollout([mean / (n + 1) ** 2 for mean in means])
