"""Classifiers of torchvision and timm by name, and the photographs that they take."""

from attrib_zoo.models.load import LoadedModel as LoadedModel
from attrib_zoo.models.load import load as load
from attrib_zoo.models.load import read_class_names as read_class_names
from attrib_zoo.models.load import unloaded as unloaded
