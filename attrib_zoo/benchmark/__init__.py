"""Methods times measures on real images, with intervals and costs."""

from attrib_zoo.benchmark.measures import FAMILIES as FAMILIES
from attrib_zoo.benchmark.measures import Measure as Measure
from attrib_zoo.benchmark.report import write_report as write_report
from attrib_zoo.benchmark.runner import evaluate as evaluate
from attrib_zoo.benchmark.table import Table as Table
