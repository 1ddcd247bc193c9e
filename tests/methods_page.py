"""docs/methods.md and a table of the README, written from the classes: what there is, where it is defined, its cost."""

import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from known_weaknesses import BLIND, OFF_TARGET

from attrib_zoo.attribution import Attribution
from attrib_zoo.cli.shared import methods

DOCS = Path(__file__).resolve().parent.parent / "docs"
KINDS = {"cnn": "CNNs", "vit": "vision transformers"}

FAMILIES = {
    "trained": (
        "Trained",
        "Fitted once for a model, without labels, and one forward pass for every map after that.",
    ),
    "gradient CAM": (
        "Gradient CAMs",
        "Feature maps of a layer, weighted by gradients. Cheap, and the first thing to try.",
    ),
    "gradient": ("Gradients of all layers", ""),
    "features": (
        "Features alone",
        "What dominates the features of a layer. They ignore the class: these maps show a backbone and explain no "
        "decision.",
    ),
    "perturbation": (
        "Perturbation",
        "Parts of the image or of the features are hidden, and the score shows what they contributed. Many passes.",
    ),
    "path": ("Paths", "Gradients along the way from a baseline to the image."),
    "attention": ("Attention", "The attention matrices of a vision transformer, multiplied through its blocks."),
    "relevance propagation": ("Relevance propagation", "The score is distributed backwards, layer by layer."),
}
"""Heading and a line for each, in the order of the page; a family that is not here comes behind them."""

HEAD = """\
# The methods

<!-- Written from the classes by tests/methods_page.py; edit those. -->

{count} methods, called alike: `Method(model).attribute(images, target)`. Defaults are the papers'; where a paper and
its authors' code differ, the reference says so under *Deviations*. `attrib-zoo list` prints the table below.

## What all of them take

**Why this and not those?** `target=Contrast(3)` explains the score of a class minus 0.6 of the mean score of the three
next classes, instead of the score alone; `Contrast(k, weight, target)` sets their number, the weight and the class. On
`GradCAM` that is Finer-CAM; every method that reads scores or their gradients supports it, and trained explainers
combine the maps of these classes in the same way, in the same single pass. `TransformerLRP` refuses it; class-agnostic
methods have one map for all targets anyway.

**Something other than a class?** `target=Scalar(function)`, or the function itself, explains any value of the outputs:
[a region, a box, a similarity, several frames](how-to/explain-other-outputs.md). Trained explainers and
`TransformerLRP` explain classes only. [Which method should I use?](how-to/which-method.md)

**Smoother maps.** `smooth=3` takes the mean over 3 x 3 cells of a map at the resolution of its layer, before it is
scaled and enlarged. It is off by default. Smooth maps keep more of the model's confidence when they mask the image, so
compare a smoothed method with a smoothed Grad-CAM. Methods whose map has the resolution of the image have no such
option.

**Another scale.** `scale="min-max"`, `"rank"` or `"positive"` scales the values of a map to [0, 1] before it is
enlarged. Ranks keep only the order, so that no extreme cell decides how bright the others are; the positive part leaves
regions without evidence for the target dark. Without it maps have the scale of their formula (trained ones are min-max
scaled). Measures that rank pixels are hardly affected; average drop is.

```python
import torch

from attrib_zoo import Contrast, GradCAM, synthetic

model, images = synthetic.tiny_cnn(), torch.rand(2, 3, 32, 32)
explainer = GradCAM(model, smooth=3, scale="rank")
why_not = explainer.attribute(images, target=Contrast(3))
both = explainer.attribute_many(images, [Contrast(3, target=1), 1])  # with and without the rivals, from one pass
```

On the command line these are `--contrast 3`, `--smooth 3` and `--scale rank`.

## Pictures

Every method explains a model's decisions on the same two photographs:

![A zebra and a traffic light, and the part of them that the model sees](images/gallery/photographs.jpg)

All maps, and what to notice in them, are in the [gallery](gallery.md).

The same two scenes of `attrib_zoo.synthetic`, in which the evidence is known; a tiny vision transformer is explained
for one of the two objects:

![Two scenes and the map of each method that is defined for the vision transformer](images/methods-scenes.jpg)

{about_scenes}

## Overview

F is a forward pass, B a backward pass, n a number of steps or samples; costs are per image.
"""

ABOUT_SCENES = """\
T-TAME and L-CAM after 100 steps, RISE with 1000 masks; `ExtremalPerturbation` with a grid and a kernel for 32 pixels.
Where a map is empty (the plain image), the method found no positive evidence. Weaknesses are visible: with one weight
per feature map, Grad-CAM and Ablation-CAM can light up the background of a transformer; rollout has one map for all
classes; the extremal perturbation of the red object settles elsewhere, and leaves traces in the corners.
`benchmarks/gallery.py` draws both pictures."""

MODELS = {"cnn": "CNN", "vit": "transformer"}
CHECKS = (
    "On scenes whose evidence is known, with a tiny CNN and a tiny vision transformer, `tests/methods/test_sanity.py` "
    "checks for every method whether its map has more energy on the target object than chance, and more "
    "than on the other object; and whether the map changes (rank correlation below 0.5) when the model's last layer "
    "gets random weights, as Adebayo et al. (NeurIPS 2018) propose. Trained methods are refitted for that model. Tiny "
    "models prove nothing about large ones. What fails:"
)
TEXT_OFF_TARGET = "No better than chance, or than the other object"
TEXT_BLIND = (
    "Much the same map with a random last layer, and the correlation (0.50 is at the limit; rollout does not use "
    "that layer; RISE had 400 masks instead of 8000, extremal perturbations 150 steps instead of 800)"
)

CAPTUM = """\
## Through Captum

Integrated Gradients, SmoothGrad, Saliency, DeepLIFT, Occlusion, guided backpropagation and Gradient SHAP are
[Captum's](https://captum.ai), and there is no second copy of them here. They go through the same pictures and the same
table as ours:

```python
import warnings

import torch
from captum.attr import DeepLift, GradientShap, GuidedBackprop, IntegratedGradients, NoiseTunnel, Occlusion, Saliency

from attrib_zoo import GradCAM, ScoreCAM, synthetic, visualize
from attrib_zoo.benchmark import evaluate

warnings.simplefilter("ignore", UserWarning)  # Captum warns of the hooks that it sets for a while
model = synthetic.trained("cnn")
scenes = synthetic.scenes(2, seed=2)
images, target = scenes.inputs.requires_grad_(), scenes.labels[:, 0]  # gradients: Captum wants them, ours do not care
black, grey = -2.0, 0.0  # standardised
some = torch.stack([torch.full((3, 32, 32), black), torch.full((3, 32, 32), grey)])

calls = {
    "GradCAM": GradCAM(model).attribute,
    "ScoreCAM": ScoreCAM(model).attribute,
    "IntegratedGradients": lambda x, target: IntegratedGradients(model).attribute(x, black, target),
    "SmoothGrad": lambda x, target: NoiseTunnel(Saliency(model)).attribute(x, nt_samples=25, stdevs=0.3, target=target),
    "Saliency": Saliency(model).attribute,
    "DeepLift": lambda x, target: DeepLift(model).attribute(x, black, target),
    "Occlusion": lambda x, target: Occlusion(model).attribute(x, (3, 5, 5), strides=(3, 3, 3), target=target),
    "GuidedBackprop": GuidedBackprop(model).attribute,
    "GradientShap": lambda x, target: GradientShap(model).attribute(x, some, target=target),
}
maps = {name: call(images, target).detach().abs() for name, call in calls.items()}
visualize.figure(scenes.images, maps, path="captum.jpg")

batch = {"image": images, "target": target, "masks": scenes.masks[:, 0], "other_masks": scenes.masks[:, 1]}
print(evaluate(model, calls, [batch], "ad,ebpg,discrimination", show_progress=False))
```

Some of them ask something of the model: DeepLIFT refuses one that uses an activation module twice (torchvision's
ResNets), and guided backpropagation is the plain gradient where there are no `nn.ReLU` modules.
[Use with Captum](how-to/use-with-captum.md) has the other direction: our methods in Captum's tools.

Layer-wise relevance propagation for CNNs is Captum's `LRP` and zennit's; it is patented, see the notice at
[`TransformerLRP`](#transformerlrp).
"""


def methods_page() -> str:
    """The text of docs/methods.md."""
    found = by_family()
    lines = [HEAD.format(count=sum(map(len, found.values())), about_scenes=ABOUT_SCENES)]
    lines += overview([cls for group in found.values() for cls in group])
    for family, group in found.items():
        title, about = FAMILIES.get(family, (family, ""))
        lines += ["", f"## {title}", "", *wrapped(about)]
        for cls in group:
            lines += entry(cls)
    lines += ["", "## Checks that a method fails", "", *weaknesses(), "", CAPTUM]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def by_family() -> dict[str, list[type[Attribution]]]:
    every = list(methods().values())
    order = [*FAMILIES, *(cls.family for cls in every)]
    return {f: group for f in dict.fromkeys(order) if (group := [cls for cls in every if cls.family == f])}


def overview(classes: list[type[Attribution]]) -> list[str]:
    rows = []
    for c in classes:
        link = f"[`{c.__name__}`](#{c.__name__.lower()})"
        marks = ["yes" if yes else "" for yes in (*(kind in c.models for kind in KINDS), c.needs_fit)]
        rows.append(f"| {' | '.join([link, c.family, c.paper, *marks, c.cost])} |")
    return ["| method | family | paper | CNN | ViT | `fit` first | cost |", "|---|---|---|---|---|---|---|", *rows]


def entry(cls: type[Attribution]) -> list[str]:
    """One method: what its map shows, where it is defined, its cost, where to read on."""
    doc = inspect.getdoc(cls) or ""
    before, _, deviations = doc.partition("\nArgs:")
    limits = [s for s in sentences(before) + sentences(deviations.partition("\nDeviations:")[2]) if is_limit(s)]
    kinds = " and ".join(KINDS[kind] for kind in cls.models)
    defined = limits if limits and limits[0].startswith(kinds) else [f"{kinds}.", *limits]
    defined += ["The map is the same for every target."] if cls.class_agnostic else []
    guide = f"methods/{cls.__module__.rpartition('.')[2]}.md"
    read = [f"[formula, options, deviations](reference/methods.md#{cls.__module__}.{cls.__name__})"]
    read += [f"[a page of its own]({guide})"] if (DOCS / guide).exists() else []
    return [
        "",
        f"### `{cls.__name__}`",
        "",
        *wrapped(_markup(doc).partition("\n\n")[0]),
        "",
        *wrapped("* Defined for " + " ".join(defined)),
        *wrapped(f"* Cost: {cls.cost}."),
        *wrapped(f"* Read on: {', '.join(read)}."),
        "",
        *notice(cls),
    ]


def notice(cls: type[Attribution]) -> list[str]:
    """A paragraph of the docstring that begins in bold, such as a patent notice."""
    paragraphs = _markup(inspect.getdoc(cls) or "").split("\n\n")
    return [line for p in paragraphs if p.startswith("**") for line in [*wrapped(" ".join(p.split())), ""]]


def _markup(text: str) -> str:
    """The few reStructuredText marks that the docstrings use."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"::$", ":", text.replace("``", "`"), flags=re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Of all paragraphs but formulas."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", _markup(text)) if ".. math::" not in p]
    return [sentence for p in paragraphs for sentence in re.split(r"(?<=[.])\s+(?=[A-Z`])", p)]


def is_limit(sentence: str) -> bool:
    return sentence.endswith(".") and ("refused" in sentence or sentence.startswith("CNNs only"))


def weaknesses() -> list[str]:
    """What tests/methods/test_sanity.py expects to fail."""
    agnostic = ", ".join(f"`{cls.__name__}`" for cls in methods().values() if cls.class_agnostic)
    lines = [*wrapped(CHECKS), ""]
    for text, found in ((TEXT_OFF_TARGET, OFF_TARGET), (TEXT_BLIND, BLIND)):
        named = [f"{model}: {listed(found[kind])}" for kind, model in MODELS.items() if found[kind]]
        lines += wrapped(f"* {text}: {'; '.join(named) or 'none'}.")
    return [*lines, *wrapped(f"* The same map for every class, so the other object is not asked of them: {agnostic}.")]


def listed(found: Iterable[str]) -> str:
    values = found if isinstance(found, dict) else {}
    return ", ".join(f"`{name}`" + (f" {values[name]:.2f}" if name in values else "") for name in sorted(found))


def wrapped(text: str) -> list[str]:
    indent = "  " * text.startswith("* ")
    return textwrap.wrap(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# ---------------------------------------------------------------------- the table of the README

WANTED = {
    "gradient CAM": "a map at once, nothing to train",
    "trained": "train once, then one pass for every map",
    "perturbation": "ask the model itself, by hiding parts; many passes",
    "attention": "what a transformer attended to",
    "relevance propagation": "the score shared out backwards",
    "path": "gradients on the way from a baseline",
    "gradient": "gradients of all layers",
}
"""Family -> what one who needs it looks for, in the order of how many do."""
MARKS = {("cnn",): "¹", ("vit",): "²"}


def methods_table() -> str:
    """The families as people look for them, each with its methods."""
    found = by_family()
    rows = []
    for family in [*WANTED, *(other for other in found if other not in WANTED)]:
        names = [f"`{cls.__name__}`{MARKS.get(tuple(cls.models), '')}" for cls in found.get(family, [])]
        if names:
            rows.append(f"| {WANTED.get(family, family)} | {', '.join(names)} |")
    table = "\n".join(["| what you want | methods |", "|---|---|", *rows])
    return f"{table}\n\n¹ CNNs only, ² vision transformers only."
