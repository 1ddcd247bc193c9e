"""Measures of a map: functions of a model, inputs, maps and a target; never of a method."""

from attrib_zoo.metrics.confidence import average_drop as average_drop
from attrib_zoo.metrics.confidence import increase_in_confidence as increase_in_confidence
from attrib_zoo.metrics.confidence import masked_confidence as masked_confidence
from attrib_zoo.metrics.localization import energy_pointing_game as energy_pointing_game
