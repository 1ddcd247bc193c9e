"""Train T-TAME once for a model, explain in one pass, save it, load it again."""

import torch

from attrib_zoo import TTAME, synthetic
from attrib_zoo.metrics import average_drop, energy_pointing_game

model = synthetic.trained("cnn")  # a tiny classifier of six colours; yours goes here
loader = synthetic.scenes(1024, seed=1).loader(batch_size=16)  # batches of standardised images; labels are not used
test = synthetic.scenes(64, seed=2)  # two objects per image, and where they are

explainer = TTAME(model).fit(loader, max_steps=100, show_progress=False)
print(explainer.report())

target = test.labels[:, 0]
maps = explainer.attribute(test.inputs, target)
on_object = energy_pointing_game(model, test.inputs, maps, masks=test.masks[:, 0]).mean()
print(f"energy of the map on the object: {on_object:.3f}, by chance {test.masks[:, 0].float().mean():.3f}")
print(f"average drop: {average_drop(model, test.inputs, maps, target).mean():.3f}")

explainer.save("ttame.safetensors")
again = TTAME.load("ttame.safetensors", model)  # raises if the model has other weights
print("loaded, same maps:", torch.equal(again.attribute(test.inputs, target), maps))
