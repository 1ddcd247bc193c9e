"""Which image regions made the model decide? Attribution methods for image classifiers, beside Captum."""

from attrib_zoo.methods.gradcam import GradCAM as GradCAM
from attrib_zoo.methods.ttame import TTAME as TTAME

__version__ = "0.1.0"
