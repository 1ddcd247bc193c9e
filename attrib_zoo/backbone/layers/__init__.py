"""Which layers a model has, what they hold, and which of them a method explains."""

from attrib_zoo.backbone.layers.resolve import RULES as RULES
from attrib_zoo.backbone.layers.resolve import Description as Description
from attrib_zoo.backbone.layers.resolve import describe as describe
from attrib_zoo.backbone.layers.resolve import look as look
from attrib_zoo.backbone.layers.resolve import resolve as resolve
