"""The experiments of three papers, each as one call: data, splits, recipe, methods, our rows next to theirs."""

from attrib_zoo.benchmark.protocols import lcam as lcam
from attrib_zoo.benchmark.protocols import sise as sise
from attrib_zoo.benchmark.protocols import ttame as ttame
from attrib_zoo.benchmark.protocols.backbones import Backbone as Backbone
from attrib_zoo.benchmark.protocols.backbones import load_backbone as load_backbone
from attrib_zoo.benchmark.protocols.compare import Comparison as Comparison
from attrib_zoo.benchmark.protocols.papers import TABLES as TABLES
from attrib_zoo.benchmark.protocols.papers import Printed as Printed
from attrib_zoo.benchmark.protocols.papers import printed as printed
from attrib_zoo.benchmark.protocols.plan import Plan as Plan
