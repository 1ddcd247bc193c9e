"""Five methods on images where the evidence is known, one of them Captum's: a table and a picture."""

from captum.attr import Saliency

from attrib_zoo import RISE, TTAME, GradCAM, ScoreCAM, synthetic, visualize
from attrib_zoo.benchmark import evaluate

model = synthetic.trained("cnn")
scenes = synthetic.scenes(16, seed=2)  # two objects of different classes in each image
target, masks = scenes.labels[:, 0], scenes.masks

methods = {
    "GradCAM": GradCAM(model),
    "ScoreCAM": ScoreCAM(model),
    "RISE": RISE(model, n_masks=500),
    "TTAME": TTAME(model).fit(synthetic.scenes(1024, seed=1).loader(16), max_steps=100, show_progress=False),
    "Saliency (Captum)": Saliency(model),
}
batch = {"image": scenes.inputs, "target": target, "masks": masks[:, 0], "other_masks": masks[:, 1]}
print(evaluate(model, methods, [batch], "ad,ebpg,discrimination", show_progress=False))

few = scenes.inputs[:4].requires_grad_()  # Saliency wants it; ours do not care
maps = {name: method.attribute(few, target=target[:4]) for name, method in methods.items()}
visualize.figure(scenes.images[:4], maps, path="compare.jpg")
