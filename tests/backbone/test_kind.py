"""One answer to "CNN or transformer?": the fit and every measure hide pixels alike, on every family."""

import engine_cases as cases
import pytest
import torch
from torch import nn

from attrib_zoo.backbone.kind import is_transformer
from attrib_zoo.metrics._scores import hidden as hidden_by_measures
from attrib_zoo.training.hidden import decide_masking, hidden

pytest.importorskip("timm")

HYBRIDS_AND_MIXERS = (
    "botnet26t_256",
    "halonet26t",
    "eca_halonext26ts",
    "lambda_resnet26t",
    "efficientformer_l1",
    "mobilenetv4_hybrid_medium",
    "coatnet_pico_rw_224",
    "nextvit_small",
    "visformer_tiny",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
)


def hidden_by_both(model: nn.Module) -> list[torch.Tensor]:
    images = torch.zeros(1, 3, 8, 8)
    fit = hidden(decide_masking(model, images, "auto", None, None), images)
    measured = hidden_by_measures(model, "auto", images)
    return [torch.as_tensor(colour).broadcast_to(1, 3, 1, 1) for colour in (fit, measured)]


@pytest.mark.parametrize("name", HYBRIDS_AND_MIXERS)
def test_convolutional_hybrids_and_mixers_are_no_transformers(name):
    model = cases.hollow(name)
    assert not is_transformer(model)
    fit, measure = hidden_by_both(model)
    assert torch.equal(fit, measure)
    assert (fit <= -1).all()  # black, standardised: -1 where mean and deviation are 0.5; the mean colour would be 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_transformers_see_the_mean_colour(name):
    fit, measure = hidden_by_both(cases.hollow(name))
    assert torch.equal(fit, measure)
    assert not fit.any()
