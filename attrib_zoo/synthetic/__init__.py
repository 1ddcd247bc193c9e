"""Scenes with planted evidence: images whose classes are known to sit in known pixels, made without a download.

Each image holds objects of different classes, each with its exact mask, and distractors of no class, on a plain
background. A map that explains the class of an object must highlight its mask; the other object in the same image
distinguishes a map of *this class* from a map of *any object*. Any image can be rendered again without one of its
objects, or with a spurious cue, a mark that a model can be trained to take for a class, with everything else bitwise
equal.

Two kinds of evidence: ``cue="colour"`` (the class is a hue, the shape is irrelevant; the tiny models of this module
learn it in seconds) and ``cue="shape"`` (the class is a shape, colour and texture are irrelevant; a CNN needs minutes,
a ViT does not learn it on a CPU).

Example:
    >>> from attrib_zoo import synthetic
    >>> data = synthetic.scenes(4, seed=7)
    >>> data.inputs.shape, data.masks.shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 2, 32, 32]))
"""

from attrib_zoo.synthetic.networks import tiny_cnn as tiny_cnn
from attrib_zoo.synthetic.networks import tiny_vit as tiny_vit
from attrib_zoo.synthetic.paint import COLOURS as COLOURS
from attrib_zoo.synthetic.scenes import CUES as CUES
from attrib_zoo.synthetic.scenes import Scenes as Scenes
from attrib_zoo.synthetic.scenes import darken as darken
from attrib_zoo.synthetic.scenes import recognised as recognised
from attrib_zoo.synthetic.scenes import scenes as scenes
from attrib_zoo.synthetic.scenes import train_classifier as train_classifier
from attrib_zoo.synthetic.scenes import trained as trained
