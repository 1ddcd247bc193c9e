"""Does a map depend on the model and on the training at all? Cascading randomisation, and repeatability over seeds.

Both take a function that makes an explainer for a model, since they need maps of models other than the given one:
``explain(model, seed)`` returns a function from ``(inputs, target)`` to maps. For a method without training that is
``lambda model, seed: GradCAM(model).attribute``. A trained explainer is fitted in it, with that seed:
``lambda model, seed: TTAME(model).fit(loader, seed=seed).attribute``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.backbone.capture import forward, forward_args, frozen, unwrap
from attrib_zoo.backbone.module import find
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import OptionError
from attrib_zoo.metrics._maps import read_maps
from attrib_zoo.metrics._scores import check_inputs
from attrib_zoo.metrics.similarity import SIMILARITIES, Similarity

Explain = Callable[[Tensor, Any], Tensor]
ExplainerFactory = Callable[[nn.Module, int], Explain]


@dataclass(frozen=True)
class Randomization:
    """How similar the maps of a model and of its randomised copies are.

    Attributes:
        layers: The L layers in the order of the cascade: copy i has layers 0 to i randomised.
        similarity: Name of a similarity -> ``(L, N)``; its mean over the images is the curve to draw. The original
            model (similarity 1) is not included.
        floor: Name -> ``(N,)``, the similarity of two explainers that were fitted for the *same* model with two
            seeds: above it, a change is indistinguishable from the noise of fitting. None if not requested.
        unseen: Layers at which no map changed at all though their weights did. The explainer does not use them:
            an edge detector reads none, and a trained explainer whose weights are kept never reads the head, so that
            the test says nothing about those; refit it (``refit``).
    """

    layers: tuple[str, ...]
    similarity: dict[str, Tensor]
    floor: dict[str, Tensor] | None
    unseen: tuple[str, ...]


def model_randomization(
    model: nn.Module,
    inputs: Tensor,
    explain: ExplainerFactory,
    target: Any = None,
    *,
    refit: bool = False,
    layers: Sequence[str] | None = None,
    similarities: Mapping[str, Similarity] | None = None,
    seed: int = 0,
    additional_forward_args: Any = None,
) -> Randomization:
    """Randomise the model layer by layer from the head down to the input, and compare its maps with the original ones.

    A map that stays the same does not show what the model has learned. The target stays the same too: the decision of
    the original model. Weights are drawn as at initialisation; normalisation layers are kept.

    Args:
        model: A classifier; it is not changed, a copy is.
        inputs: ``(N, C, H, W)``.
        explain: Makes the explainer for a model, see the module docstring; called with ``seed`` each time.
        target: In any of Captum's forms; ``None`` is the model's own decision.
        refit: ``explain`` fits a new explainer: also measure the floor, with another seed on the same model. A
            randomised model predicts few classes, and an explainer that is trained on its decisions learns no others.
        layers: Names of layers (or of blocks, whose layers are randomised together), the head first. ``None`` is every
            layer with weights, in reverse execution order.
        similarities: Name -> function of two batches of maps; all of ``metrics.similarity`` when ``None``.
        seed: For the random weights, different for each layer, and for the explainers.
        additional_forward_args: For the model, where ``layers`` or ``target`` is ``None``.

    Returns:
        Similarities for each layer and image, the floor, and the layers that the explainer does not use.

    Raises:
        LayerNotFoundError: No layer of that name.
        OptionError: A layer without weights to randomise.

    References:
        Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018.
    """
    check_inputs(inputs)
    similarities = SIMILARITIES if similarities is None else similarities
    order, target = _order_and_target(model, inputs, target, forward_args(additional_forward_args))
    names = order if layers is None else list(layers)
    changed = copy.deepcopy(unwrap(model))
    groups = [_inside(changed, name) for name in names]
    first = explain(model, seed)(inputs, target).detach().clone()
    rows: list[dict[str, Tensor]] = []
    unseen = []
    before = first
    for place, (name, group) in enumerate(zip(names, groups, strict=True)):
        _randomize(group, seed + 7919 * (place + 1))
        maps = explain(changed, seed)(inputs, target).detach().clone()
        rows.append(_compare(first, maps, similarities))
        if torch.equal(maps, before):
            unseen.append(name)
        before = maps
    floor = _compare(first, explain(model, seed + 1)(inputs, target), similarities) if refit else None
    stacked = {name: torch.stack([row[name] for row in rows]) for name in similarities}
    return Randomization(tuple(names), stacked, floor, tuple(unseen))


def repeatability(
    model: nn.Module,
    inputs: Tensor,
    explain: ExplainerFactory,
    target: Any = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    similarities: Mapping[str, Similarity] | None = None,
    additional_forward_args: Any = None,
) -> dict[str, Tensor]:
    """How similar the maps of explainers that differ only in their seed are: the mean over all pairs of seeds.

    Args:
        model: A classifier.
        inputs: ``(N, C, H, W)``.
        explain: Makes (and fits) the explainer for the model with a seed, see the module docstring.
        target: In any of Captum's forms; ``None`` is the model's own decision.
        seeds: Two or more.
        similarities: Name -> function of two batches of maps; all of ``metrics.similarity`` when ``None``.
        additional_forward_args: For the model, where ``target`` is ``None``.

    Returns:
        Name -> ``(N,)``; 1 for a deterministic method.
    """
    check_inputs(inputs)
    if len(set(seeds)) < 2 or len(set(seeds)) != len(seeds):
        raise OptionError(f"seeds: must be two or more different ones, got {seeds!r}")
    similarities = SIMILARITIES if similarities is None else similarities
    _, target = _order_and_target(model, inputs, target, forward_args(additional_forward_args))
    maps = [explain(model, seed)(inputs, target).detach().clone() for seed in seeds]
    pairs = [_compare(a, b, similarities) for i, a in enumerate(maps) for b in maps[i + 1 :]]
    return {name: torch.stack([pair[name] for pair in pairs]).mean(0) for name in similarities}


def randomization_order(model: nn.Module, inputs: Tensor, *, additional_forward_args: Any = None) -> list[str]:
    """Names of all layers with weights to randomise, the last to run first.

    A layer that runs several times counts where it runs last; one that never runs by itself (the output projection
    of torch's attention) where the module around it does. Tokens and position embeddings count too, under the name
    of the module that holds them: the empty name for the model itself.
    """
    return _order_and_target(model, inputs, 0, forward_args(additional_forward_args))[0]


def _order_and_target(model: nn.Module, inputs: Tensor, target: Any, args: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The cascade, and the fixed target; one pass of the model."""
    started: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any) -> None:
        started[module] = len(calls)
        calls.append(module)

    calls: list[nn.Module] = []
    with frozen(model) as bare, torch.no_grad(), ExitStack() as stack:
        names = {module: name for name, module in bare.named_modules()}
        for module in names:
            stack.callback(module.register_forward_pre_hook(note).remove)
        outputs = forward(bare, inputs, args)
    if target is None:
        index = TargetQuery(None).resolve(outputs).index[:, 0]
        target = index[:, 0] if index.shape[1] == 1 else None
    layers = [(place, name) for place, (module, name) in enumerate(names.items()) if _has_weights(module)]
    found = [(_start(bare, name, started), place, name) for place, name in layers]
    return [name for _, _, name in sorted(found, reverse=True)], target


def _start(model: nn.Module, name: str, started: Mapping[nn.Module, int]) -> int:
    """When a layer last ran, or, if it never runs by itself, the innermost enclosing module that does."""
    while name and find(model, name) not in started:
        name = name.rpartition(".")[0]
    return started[find(model, name)]


def _inside(model: nn.Module, name: str) -> list[nn.Module]:
    """The layers with weights in a layer or block; of the model itself, only what is directly in it."""
    block = find(model, name)
    found = [m for m in (block.modules() if name else [block]) if _has_weights(m)]
    if not found:
        raise OptionError(f"layers: {name!r} has no weights to randomise (normalisation is kept); leave it out")
    return found


def _randomize(layers: Iterable[nn.Module], seed: int) -> None:
    """New weights in place, drawn on the CPU; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for layer in layers:
            reset = _reset_of(layer)
            own = dict(layer.named_parameters(recurse=False))
            if reset is None:
                for value in own.values():
                    if _is_table(value):
                        value.copy_(nn.init.trunc_normal_(torch.empty(value.shape), std=0.02))
                continue
            fresh = copy.deepcopy(layer).cpu()
            getattr(fresh, reset)()
            for name, value in fresh.named_parameters(recurse=False):
                own[name].copy_(value)


def _has_weights(module: nn.Module) -> bool:
    if any("Norm" in kind.__name__ for kind in type(module).__mro__):
        return False
    own = list(module.parameters(recurse=False))
    return any(value.ndim > 1 if _reset_of(module) else _is_table(value) for value in own)


def _reset_of(module: nn.Module) -> str | None:
    """The method that redraws a module's weights."""
    return next((name for name in ("reset_parameters", "_reset_parameters") if hasattr(module, name)), None)


def _is_table(value: Tensor) -> bool:
    """Tokens, position embeddings and the like; not channel scales, which are kept, like normalisation layers."""
    return value.ndim >= 2 and value.shape[-1] > 1


def _compare(one: Tensor, two: Tensor, similarities: Mapping[str, Similarity]) -> dict[str, Tensor]:
    a, b = read_maps(one, len(one)), read_maps(two, len(one))
    return {name: similarity(a, b) for name, similarity in similarities.items()}
