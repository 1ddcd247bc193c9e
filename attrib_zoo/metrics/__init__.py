"""Measures of a map: functions of a model, inputs, maps and a target; never of a method."""

from attrib_zoo.metrics._regions import box_masks as box_masks
from attrib_zoo.metrics.complexity import sparseness as sparseness
from attrib_zoo.metrics.complexity import total_variation as total_variation
from attrib_zoo.metrics.confidence import average_drop as average_drop
from attrib_zoo.metrics.confidence import drop_rate as drop_rate
from attrib_zoo.metrics.confidence import increase_in_confidence as increase_in_confidence
from attrib_zoo.metrics.confidence import increase_rate as increase_rate
from attrib_zoo.metrics.confidence import masked_confidence as masked_confidence
from attrib_zoo.metrics.imputation import linear_imputation as linear_imputation
from attrib_zoo.metrics.insertion_deletion import deletion as deletion
from attrib_zoo.metrics.insertion_deletion import deletion_curve as deletion_curve
from attrib_zoo.metrics.insertion_deletion import insertion as insertion
from attrib_zoo.metrics.insertion_deletion import insertion_curve as insertion_curve
from attrib_zoo.metrics.localization import bbox_score as bbox_score
from attrib_zoo.metrics.localization import class_discrimination as class_discrimination
from attrib_zoo.metrics.localization import energy_pointing_game as energy_pointing_game
from attrib_zoo.metrics.localization import miou as miou
from attrib_zoo.metrics.localization import pointing_game as pointing_game
from attrib_zoo.metrics.road import road as road
from attrib_zoo.metrics.road import road_curve as road_curve
