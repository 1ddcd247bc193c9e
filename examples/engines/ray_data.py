"""Explain the rows of a Ray dataset: pip install 'attrib_zoo[ray]'."""

import numpy as np
import ray

from attrib_zoo import GradCAM
from attrib_zoo.models.batch import BatchExplainer
from attrib_zoo.synthetic import tiny_vit  # yours: functools.partial(attrib_zoo.models.load, "resnet50")

images = 3 * np.random.default_rng(0).standard_normal((24, 3, 32, 32), dtype=np.float32)
explain = BatchExplainer(tiny_vit, GradCAM)

ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
try:
    rows = ray.data.from_items([{"id": i, "image": image} for i, image in enumerate(images)])
    batches = rows.map_batches(explain, batch_size=8)  # pyright: ignore[reportArgumentType]  # Ray wants tables too
    found = batches.sort("id").take_all()
finally:
    ray.shutdown()
maps = np.stack([row["map"] for row in found])
classes = np.array([row["class"] for row in found])
print(f"{len(maps)} maps of {maps.shape[1]} x {maps.shape[2]} cells, of the classes {sorted(set(classes.tolist()))}")
