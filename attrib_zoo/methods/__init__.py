"""One module per method, each from a paper, and what it takes to write another: ``from attrib_zoo.methods import ...``.

A method subclasses a base and implements its hooks; the base does the rest.

* :class:`Attribution`, the base of all: any method.
* :class:`GradientCAM`: feature maps weighted by gradients.
* :class:`Perturbation`: scores of masked images; :class:`PerturbationCAM`: the masks are feature maps;
  :class:`BlockwiseSampling`: chosen feature maps of all stages, as SISE does.
* :class:`AttentionMethod`: attention matrices of a vision transformer; ``relevance`` has the rules that propagate
    relevance back through its layers.
* :class:`TrainableAttribution`: a network that is trained to explain; :class:`FittedAttribution`: one that comes about
  in a way of its own.
* :class:`OnePass`: maps from one pass without a gradient, which can be exported with the model.

``docs/how-to/add-a-method.md`` lists the hooks of each. In this package a new method is a module here and a line in
``attrib_zoo/__init__.py``; :func:`list_methods` finds it.
"""

import importlib
import pkgutil

from attrib_zoo.attribution import Attribution as Attribution
from attrib_zoo.backbone.capture import forward as forward
from attrib_zoo.backbone.capture import run as run
from attrib_zoo.backbone.capture import run_with_graph as run_with_graph
from attrib_zoo.backbone.grid import Grid as Grid
from attrib_zoo.backbone.grid import Tap as Tap
from attrib_zoo.backbone.replay import replay as replay
from attrib_zoo.backbone.targets import Target as Target
from attrib_zoo.backbone.targets import TargetQuery as TargetQuery
from attrib_zoo.masking import at_least_float32 as at_least_float32
from attrib_zoo.masking import min_max as min_max
from attrib_zoo.masking import upsample as upsample
from attrib_zoo.methods.bases import relevance as relevance
from attrib_zoo.methods.bases.attention import AttentionMethod as AttentionMethod
from attrib_zoo.methods.bases.attention import attention_for as attention_for
from attrib_zoo.methods.bases.attention import not_zero as not_zero
from attrib_zoo.methods.bases.attention import positive as positive
from attrib_zoo.methods.bases.attention import with_identity as with_identity
from attrib_zoo.methods.bases.blockwise import BlockwiseSampling as BlockwiseSampling
from attrib_zoo.methods.bases.fitted import FittedAttribution as FittedAttribution
from attrib_zoo.methods.bases.gradient_cam import GradientCAM as GradientCAM
from attrib_zoo.methods.bases.gradient_cam import differentiate as differentiate
from attrib_zoo.methods.bases.one_pass import OnePass as OnePass
from attrib_zoo.methods.bases.perturbation import Passes as Passes
from attrib_zoo.methods.bases.perturbation import Perturbation as Perturbation
from attrib_zoo.methods.bases.perturbation import PerturbationCAM as PerturbationCAM
from attrib_zoo.methods.bases.progress import progress as progress
from attrib_zoo.methods.bases.trainable import TrainableAttribution as TrainableAttribution
from attrib_zoo.training.fit import Terms as Terms
from attrib_zoo.training.schedule import Schedule as Schedule


def list_methods() -> dict[str, type[Attribution]]:
    """Every method of this library by class name, in alphabetical order.

    Returns:
        name -> class: the subclasses of :class:`Attribution` that the modules of this package define.
    """
    found: dict[str, type[Attribution]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and isinstance(value, type) and issubclass(value, Attribution):
                found[name] = value
    return dict(sorted(found.items()))
