"""Five methods on images where the evidence is known, one of them Captum's: a table and a picture."""

from captum.attr import Saliency

from attrib_zoo import RISE, TTAME, GradCAM, ScoreCAM, synthetic, visualize
from attrib_zoo.benchmark import evaluate

model = synthetic.trained("cnn")
scenes = synthetic.scenes(16, seed=2)  # two objects of different classes in each image
images = scenes.inputs.requires_grad_()  # Saliency wants it; ours do not care
target, masks = scenes.labels[:, 0], scenes.masks

methods = {
    "GradCAM": GradCAM(model),
    "ScoreCAM": ScoreCAM(model),
    "RISE": RISE(model, n_masks=300),
    "TTAME": TTAME(model).fit(synthetic.scenes(1024, seed=1).loader(16), max_steps=60, show_progress=False),
    "Saliency (Captum)": Saliency(model),
}
batch = {"image": images, "target": target, "masks": masks[:, 0], "other_masks": masks[:, 1]}
print(evaluate(model, methods, [batch], "ad,ebpg,discrimination", show_progress=False))

few = images[:4].detach().requires_grad_()
maps = {name: method.attribute(few, target=target[:4]).detach() for name, method in methods.items()}
visualize.figure(scenes.images[:4], maps, path="compare.jpg")
