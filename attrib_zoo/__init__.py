"""Which image regions made the model decide? Attribution methods for image classifiers, alongside Captum."""

from attrib_zoo.backbone.targets import Contrast as Contrast
from attrib_zoo.backbone.targets import Scalar as Scalar
from attrib_zoo.methods.ablationcam import AblationCAM as AblationCAM
from attrib_zoo.methods.adasise import AdaSISE as AdaSISE
from attrib_zoo.methods.cam import CAM as CAM
from attrib_zoo.methods.eigencam import EigenCAM as EigenCAM
from attrib_zoo.methods.extremal import ExtremalPerturbation as ExtremalPerturbation
from attrib_zoo.methods.factorization import DeepFeatureFactorization as DeepFeatureFactorization
from attrib_zoo.methods.fullgrad import FullGrad as FullGrad
from attrib_zoo.methods.generic_attention import GenericAttention as GenericAttention
from attrib_zoo.methods.gradcam import GradCAM as GradCAM
from attrib_zoo.methods.gradcam_plus_plus import GradCAMPlusPlus as GradCAMPlusPlus
from attrib_zoo.methods.hirescam import HiResCAM as HiResCAM
from attrib_zoo.methods.iia import IIA as IIA
from attrib_zoo.methods.integrated_gradcam import IntegratedGradCAM as IntegratedGradCAM
from attrib_zoo.methods.layercam import LayerCAM as LayerCAM
from attrib_zoo.methods.lcam import LCAMFm as LCAMFm
from attrib_zoo.methods.lcam import LCAMImg as LCAMImg
from attrib_zoo.methods.legrad import LeGrad as LeGrad
from attrib_zoo.methods.polycam import PolyCAM as PolyCAM
from attrib_zoo.methods.refinecam import RefineCAM as RefineCAM
from attrib_zoo.methods.rise import RISE as RISE
from attrib_zoo.methods.rollout import AttentionRollout as AttentionRollout
from attrib_zoo.methods.scorecam import ScoreCAM as ScoreCAM
from attrib_zoo.methods.sidu import SIDU as SIDU
from attrib_zoo.methods.sise import SISE as SISE
from attrib_zoo.methods.smooth_gradcam_plus_plus import SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus
from attrib_zoo.methods.transformer_lrp import TransformerLRP as TransformerLRP
from attrib_zoo.methods.ttame import TTAME as TTAME
from attrib_zoo.methods.xgradcam import XGradCAM as XGradCAM
from attrib_zoo.methods.zoomcam import ZoomCAM as ZoomCAM

__version__ = "0.2.0"
