"""Explain the rows of a Spark table: pip install 'attrib_zoo[spark]', and Java 17."""

import os
import sys

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType, LongType, StructType

from attrib_zoo import GradCAM
from attrib_zoo.models.batch import BatchExplainer
from attrib_zoo.synthetic import tiny_vit  # yours: functools.partial(attrib_zoo.models.load, "resnet50")

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
images = 3 * np.random.default_rng(0).standard_normal((24, 3, 32, 32), dtype=np.float32)
explain = BatchExplainer(tiny_vit, GradCAM, {"class": "label", "map": "heat"})
written = StructType().add("label", LongType()).add("confidence", FloatType()).add("heat", ArrayType(FloatType()))

spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
try:
    options = {"batch_size": 8, "input_tensor_shapes": [[3, 32, 32]]}
    explained = predict_batch_udf(explain.make_predict_fn, return_type=written, **options)
    rows = ((i, image.ravel().tolist()) for i, image in enumerate(images))
    table = spark.createDataFrame(list(rows), "id long, image array<float>")
    found = table.select("id", explained("image").alias("it")).select("id", "it.*").orderBy("id").collect()
finally:
    spark.stop()
maps, classes = np.array([row.heat for row in found]).reshape(24, 8, 8), np.array([row.label for row in found])
print(f"{len(maps)} maps, of the classes {sorted(set(classes.tolist()))}")
