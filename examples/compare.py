"""Two of our methods and one of Captum's on images where the evidence is known; all are called alike."""

import torch
from captum.attr import Saliency

from attrib_zoo import TTAME, GradCAM, synthetic
from attrib_zoo.metrics import average_drop, energy_pointing_game

model = synthetic.trained("cnn")
scenes = synthetic.scenes(64, seed=2)  # two objects of different classes in each image
images, target = scenes.inputs.requires_grad_(), scenes.labels[:, 0]  # Saliency wants it; ours do not care
asked, other = scenes.masks[:, 0], scenes.masks[:, 1]

ttame = TTAME(model).fit(synthetic.scenes(1024, seed=1).loader(16), max_steps=100, show_progress=False)
methods = {"Saliency (Captum)": Saliency(model), "GradCAM": GradCAM(model), "TTAME": ttame}
maps = {name: method.attribute(images, target=target).detach() for name, method in methods.items()}
maps["no structure"] = torch.ones_like(images)

print(f"{'':18} energy on the asked object, on the other; average drop when 15 % are shown")
for name, found in maps.items():
    on_asked = energy_pointing_game(model, images, found, masks=asked, normalize=False).mean()
    on_other = energy_pointing_game(model, images, found, masks=other, normalize=False).mean()
    drop = average_drop(model, images, found, target, keep=0.15).mean()
    print(f"{name:18} {on_asked:.3f}  {on_other:.3f}  {drop:.3f}")
