"""Which image regions made the model decide? Attribution methods for image classifiers, beside Captum."""

from attrib_zoo.methods.cam import CAM as CAM
from attrib_zoo.methods.fullgrad import FullGrad as FullGrad
from attrib_zoo.methods.gradcam import GradCAM as GradCAM
from attrib_zoo.methods.gradcam_plus_plus import GradCAMPlusPlus as GradCAMPlusPlus
from attrib_zoo.methods.hirescam import HiResCAM as HiResCAM
from attrib_zoo.methods.integrated_gradcam import IntegratedGradCAM as IntegratedGradCAM
from attrib_zoo.methods.layercam import LayerCAM as LayerCAM
from attrib_zoo.methods.lcam import LCAMFm as LCAMFm
from attrib_zoo.methods.lcam import LCAMImg as LCAMImg
from attrib_zoo.methods.smooth_gradcam_plus_plus import SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus
from attrib_zoo.methods.ttame import TTAME as TTAME
from attrib_zoo.methods.xgradcam import XGradCAM as XGradCAM
from attrib_zoo.methods.zoomcam import ZoomCAM as ZoomCAM

__version__ = "0.1.0"
