"""Which image regions made the model decide? Attribution methods for image classifiers, beside Captum."""

from attrib_zoo.methods.ablationcam import AblationCAM as AblationCAM
from attrib_zoo.methods.adasise import AdaSISE as AdaSISE
from attrib_zoo.methods.extremal import ExtremalPerturbation as ExtremalPerturbation
from attrib_zoo.methods.generic_attention import GenericAttention as GenericAttention
from attrib_zoo.methods.gradcam import GradCAM as GradCAM
from attrib_zoo.methods.iia import IIA as IIA
from attrib_zoo.methods.polycam import PolyCAM as PolyCAM
from attrib_zoo.methods.rise import RISE as RISE
from attrib_zoo.methods.rollout import AttentionRollout as AttentionRollout
from attrib_zoo.methods.scorecam import ScoreCAM as ScoreCAM
from attrib_zoo.methods.sidu import SIDU as SIDU
from attrib_zoo.methods.sise import SISE as SISE
from attrib_zoo.methods.transformer_lrp import TransformerLRP as TransformerLRP
from attrib_zoo.methods.ttame import TTAME as TTAME

__version__ = "0.1.0"
