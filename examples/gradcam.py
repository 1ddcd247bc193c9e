"""Grad-CAM for any torchvision or timm classifier, for the model's decision and for a class of your choice."""

import torch
from torchvision.models import resnet18

from attrib_zoo import GradCAM

model = resnet18(weights=None)  # weights="DEFAULT" downloads trained ones
images = torch.randn(2, 3, 224, 224)  # photographs, standardised as the model was trained with

explainer = GradCAM(model)  # finds the layer itself; GradCAM(model, "layer3") names one
decided = explainer.attribute(images)  # for the class that the model decides for
asked = explainer.attribute(images, target=[281, 207])  # for a class of each image
both = explainer.attribute_many(images, [281, 207])  # two classes of every image from one forward pass

print(explainer)
print("maps", tuple(decided.shape), "strongest for class 281:", asked[0].amax().item())
print("many", tuple(both.shape), "the same map:", torch.allclose(both[0, 0], asked[0], atol=1e-6))
