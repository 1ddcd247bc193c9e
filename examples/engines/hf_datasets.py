"""Explain the rows of a Hugging Face dataset: pip install 'attrib_zoo[datasets]'."""

import numpy as np
from datasets import Dataset

from attrib_zoo import GradCAM
from attrib_zoo.models.batch import BatchExplainer
from attrib_zoo.synthetic import tiny_vit  # yours: functools.partial(attrib_zoo.models.load, "resnet50")

images = 3 * np.random.default_rng(0).standard_normal((24, 3, 32, 32), dtype=np.float32)
explain = BatchExplainer(tiny_vit, GradCAM)

rows = Dataset.from_dict({"id": list(range(24)), "image": list(images)}).with_format("numpy")
found = rows.map(explain, batched=True, batch_size=8, remove_columns=["image"])
maps, classes = np.stack(list(found["map"])), np.array(found["class"])
print(f"{len(maps)} maps of {maps.shape[1]} x {maps.shape[2]} cells, of the classes {sorted(set(classes.tolist()))}")
