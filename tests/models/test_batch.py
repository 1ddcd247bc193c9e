"""Batches in, batches out: equal to ``attribute``, small when pickled, loaded once, and the same on every engine."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.errors import DataError, OptionError
from attrib_zoo.models import LoadedModel, batch
from attrib_zoo.models.batch import BatchExplainer
from attrib_zoo.synthetic import tiny_cnn, tiny_vit

ENGINES = Path(__file__).resolve().parents[2] / "examples" / "engines"
IMAGES = np.random.default_rng(0).random((24, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def wanted() -> tuple[np.ndarray, np.ndarray]:
    """Maps and classes by ``attribute`` and the model itself."""
    model, images = tiny_cnn(), torch.from_numpy(IMAGES)
    with torch.no_grad():
        classes = model(images).argmax(1)
    return GradCAM(model, upsample=False).attribute(images)[:, 0].numpy(), classes.numpy()


def transform(photo: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(photo.convert("RGB").resize((32, 32)))).permute(2, 0, 1).float() / 255


def loaded() -> LoadedModel:
    return LoadedModel(tiny_cnn(), transform, transform, (0.0,) * 3, (1.0,) * 3, (3, 32, 32), 6, None)


LOADS: list[int] = []


def counted() -> nn.Module:
    LOADS.append(1)
    return tiny_cnn()


# ---------------------------------------------------------------------- what comes out


def test_a_batch_is_what_attribute_says(wanted) -> None:
    explain = BatchExplainer(tiny_cnn, GradCAM)
    found = explain({"id": np.arange(24), "image": IMAGES})
    assert sorted(found) == ["class", "confidence", "id", "map"]
    assert np.allclose(found["map"], wanted[0], atol=1e-6)
    assert (found["class"] == wanted[1]).all()
    shares = tiny_cnn()(torch.from_numpy(IMAGES)).softmax(1)
    assert np.allclose(found["confidence"], shares.max(1).values.detach(), atol=1e-6)
    assert (found["id"] == np.arange(24)).all()
    assert (found["map"].dtype, found["confidence"].dtype, found["class"].dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize(
    "images",
    [list(IMAGES), IMAGES.tolist(), torch.from_numpy(IMAGES), np.array([*IMAGES, None], dtype=object)[:-1]],
    ids=["arrays", "lists", "tensor", "objects"],
)
def test_images_come_in_many_forms(wanted, images) -> None:
    assert np.allclose(BatchExplainer(tiny_cnn, GradCAM)({"image": images})["map"], wanted[0], atol=1e-6)


def test_photographs_are_prepared_as_the_model_wants_them(tmp_path) -> None:
    pixels = (IMAGES[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    photo = Image.fromarray(pixels).resize((50, 40))
    file = io.BytesIO()
    photo.save(file, format="PNG")
    photo.save(tmp_path / "a.png")
    data = file.getvalue()
    forms = [photo, data, str(tmp_path / "a.png"), np.asarray(photo), {"bytes": data, "path": None}]
    found = BatchExplainer(loaded, GradCAM)({"image": forms})["map"]
    want = GradCAM(tiny_cnn(), upsample=False).attribute(transform(photo)[None])[0, 0].numpy()
    assert all(np.allclose(heat, want, atol=1e-5) for heat in found)


def test_columns_have_the_names_that_are_asked_for(wanted) -> None:
    targets = np.arange(24) % 6
    names = {"image": "pixels", "target": "asked", "map": "heat", "confidence": None}
    found = BatchExplainer(tiny_cnn, GradCAM, names, upsample=True)({"pixels": IMAGES, "asked": targets})
    assert sorted(found) == ["asked", "class", "heat"]
    want = GradCAM(tiny_cnn()).attribute(torch.from_numpy(IMAGES), targets.tolist())[:, 0]
    assert np.allclose(found["heat"], want, atol=1e-6)
    assert (found["class"] == targets).all()


def test_a_fitted_explainer_comes_from_its_file(tmp_path) -> None:
    model = tiny_cnn()
    ttame = TTAME(model)
    ttame.fit([torch.from_numpy(IMAGES)], max_steps=0, show_progress=False).save(tmp_path / "t.safetensors")
    found = BatchExplainer(tiny_cnn, tmp_path / "t.safetensors")({"image": IMAGES})
    ttame.upsample = False
    assert np.allclose(found["map"], ttame.attribute(torch.from_numpy(IMAGES))[:, 0], atol=1e-6)


# ---------------------------------------------------------------------- workers


def test_it_is_small_and_loads_once() -> None:
    LOADS.clear()
    explain = BatchExplainer(counted, GradCAM)
    assert LOADS == []
    explain({"image": IMAGES[:2]})
    sent = pickle.dumps(explain)
    assert len(sent) < 2000
    for _ in range(3):
        pickle.loads(sent)({"image": IMAGES[:2]})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: explain({"image": IMAGES[:2]}), range(8)))
    assert len(LOADS) == 1
    for _ in range(batch._KEPT):
        BatchExplainer(counted, GradCAM)({"image": IMAGES[:1]})
    assert len(batch._loaded) == batch._KEPT


def test_threads_that_come_first_wait_for_one_load() -> None:
    LOADS.clear()
    explain, begin = BatchExplainer(counted, GradCAM), threading.Barrier(4)

    def call(_: int) -> Any:
        begin.wait()
        return explain({"image": IMAGES[:1]})["class"]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert len(LOADS) == 1


@pytest.mark.slow
def test_processes_explain_alike(wanted) -> None:
    explain = BatchExplainer(tiny_cnn, partial(GradCAM, layers=None))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(explain, [{"image": part} for part in np.split(IMAGES, 3)]))
    assert np.allclose(np.concatenate([part["map"] for part in parts]), wanted[0], atol=1e-6)


# ---------------------------------------------------------------------- what is wrong


def test_bad_photographs_get_a_reason_or_stop() -> None:
    pixels = (IMAGES[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    values = {"image": [b"no image", pixels, b""]}
    with pytest.raises(DataError, match=r"image-0' is no image that can be read \(unknown format\)"):
        BatchExplainer(loaded, GradCAM)(values)
    found = BatchExplainer(loaded, GradCAM, skip_bad=True)(values)
    assert found["class"].tolist() == [-1, found["class"][1], -1]
    assert found["class"][1] >= 0
    assert np.isnan(found["map"][[0, 2]]).all()
    assert np.isfinite(found["map"][1]).all()
    assert ["no image" in why for why in found["error"]] == [True, False, True]
    nothing = BatchExplainer(loaded, GradCAM, skip_bad=True)({"image": [b""]})
    assert nothing["map"].shape[1:] == found["map"].shape[1:]


@pytest.mark.parametrize(
    ("make", "values", "said"),
    [
        (
            lambda: BatchExplainer(tiny_cnn(), GradCAM),
            {},
            "model_factory: must be a function that makes it, .* TinyCNN",
        ),
        (lambda: BatchExplainer(tiny_cnn, GradCAM(tiny_cnn())), {}, "explainer: must be a function .* got GradCAM"),
        (lambda: BatchExplainer(tiny_cnn, GradCAM, {"heat": "x"}), {}, "columns: must name some of image, .*'heat'"),
        (lambda: BatchExplainer(tiny_cnn, GradCAM, {"image": None}), {}, "columns: 'image' must name a column"),
        (lambda: BatchExplainer(list, GradCAM), {"image": IMAGES}, "model_factory: must return a torch .* got list"),
        (lambda: BatchExplainer(tiny_cnn, nn.Identity), {"image": IMAGES}, "explainer: must make .* got Identity"),
        (lambda: BatchExplainer(tiny_cnn, GradCAM), {"photo": IMAGES}, "must have the column 'image', got 'photo'"),
        (lambda: BatchExplainer(tiny_cnn, GradCAM), {"image": []}, "must have at least one image"),
        (lambda: BatchExplainer(tiny_cnn, GradCAM), {"image": [b"x"]}, "brings no preprocessing, got bytes"),
        (lambda: BatchExplainer(loaded, GradCAM), {"image": [7]}, "image 0 must be a photograph .*, got int"),
        (
            lambda: BatchExplainer(tiny_cnn, GradCAM),
            {"image": [IMAGES[0], IMAGES[0, :, :16]]},
            r"must have one shape, got \[\(3, 16, 32\), \(3, 32, 32\)\]",
        ),
    ],
)
def test_what_is_wrong_is_said(make, values, said) -> None:
    with pytest.raises((OptionError, DataError), match=said):
        make()(values)


# ---------------------------------------------------------------------- engines

_RUN = """
import runpy, sys, numpy
found = runpy.run_path(sys.argv[1], run_name="__main__")
numpy.savez(sys.argv[2], maps=found["maps"], classes=found["classes"])
"""
_PANDAS = """
import os, sys
from collections.abc import Iterator
import numpy as np, pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.functions import pandas_udf
from attrib_zoo import GradCAM
from attrib_zoo.models.batch import BatchExplainer
from attrib_zoo.synthetic import tiny_vit
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
images = 3 * np.random.default_rng(0).standard_normal((24, 3, 32, 32), dtype=np.float32)
explain = BatchExplainer(tiny_vit, GradCAM)
def explained(images: pd.Series) -> pd.DataFrame:
    found = explain({"image": np.stack([image.reshape(3, 32, 32) for image in images])})
    return pd.DataFrame({"label": found["class"], "heat": [heat.ravel() for heat in found["map"]]})
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
try:
    explained = pandas_udf(explained, "label long, heat array<float>")
    rows = [(i, image.ravel().tolist()) for i, image in enumerate(images)]
    table = spark.createDataFrame(rows, "id long, image array<float>")
    found = table.select("id", explained("image").alias("it")).select("id", "it.*").orderBy("id").collect()
finally:
    spark.stop()
maps = np.array([row.heat for row in found], dtype=np.float32).reshape(24, 8, 8)
classes = np.array([row.label for row in found])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "needs"),
    [("ray_data.py", "ray"), ("spark.py", "pyspark"), ("pandas", "pyspark"), ("hf_datasets.py", "datasets")],
)
def test_every_engine_says_what_attribute_says(tmp_path, example, needs) -> None:
    pytest.importorskip(needs, reason=f"the extra of {needs} is not installed")
    path = ENGINES / example
    if example == "pandas":
        path = tmp_path / "pandas_example.py"
        path.write_text(_PANDAS)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ENGINES.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # by default workers wait for all else on the machine
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path), str(tmp_path / "out.npz")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = tiny_vit()
    images = torch.from_numpy(3 * np.random.default_rng(0).standard_normal((24, 3, 32, 32), dtype=np.float32))
    want = GradCAM(model, upsample=False).attribute(images)[:, 0].numpy()
    classes = model(images).argmax(1).tolist()
    assert len(set(classes)) > 1
    with np.load(tmp_path / "out.npz") as found:
        assert np.allclose(found["maps"], want, atol=1e-5 * np.abs(want).max())
        assert found["classes"].tolist() == classes


@pytest.mark.parametrize("path", sorted(ENGINES.glob("*.py")), ids=lambda path: path.name)
def test_the_examples_are_short(path) -> None:
    assert len(path.read_text().splitlines()) <= 30
