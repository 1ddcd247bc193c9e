"""What a map costs on top of a prediction: the model alone against the model with its map, in each runtime.

Usage: python benchmarks/export.py [--models resnet50 vit_s] [--runtimes eager compiled onnxruntime] [--batch 4]

Each pair is timed in one run, alternately, by the process's CPU time on one thread; the ratio is the median of the
rounds' ratios, with a 95 % interval of that median. Weights are random (time does not depend on them), the explainer is
T-TAME as it comes with all of the model's 1000 classes. ``attribute`` is the ordinary call, which also makes the mirror
and checks its arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from attrib_zoo import TTAME

RUNTIMES = ("eager", "attribute", "compiled", "onnxruntime")
Call = Callable[[], Any]


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def vit_s() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224")


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18()


MODELS = {"resnet50": resnet50, "vit_s": vit_s, "resnet18": resnet18}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet50", "vit_s"])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    setting = f"one thread, batch {options.batch}, 224 px, {options.rounds} rounds, torch {torch.__version__}"
    found: dict[str, Any] = {"setting": setting}
    for name in options.models:
        torch.manual_seed(0)
        model, images = MODELS[name]().eval(), torch.randn(options.batch, 3, 224, 224)
        explainer = TTAME(model).fit([images], max_steps=0, show_progress=False)
        found[name] = {}
        for runtime in options.runtimes:
            with torch.no_grad():
                alone, explained = PAIRS[runtime](explainer, images)
                found[name][runtime] = compare(alone, explained, options.rounds)
            print(name, runtime, json.dumps(found[name][runtime]), flush=True)
    print(table(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def compare(alone: Call, explained: Call, rounds: int) -> dict[str, float]:
    """CPU milliseconds of both, and the median ratio with its interval, which two of the sorted ratios bound."""
    for call in (alone, explained, alone, explained):
        call()
    pairs = [(cpu(alone), cpu(explained)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    outside = max(0, int((rounds - 1.96 * math.sqrt(rounds)) / 2))  # on each side; signs of a fair coin
    return {
        "alone_ms": round(1000 * statistics.median(a for a, _ in pairs), 1),
        "with_map_ms": round(1000 * statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[outside], 3),
        "high": round(ratios[-1 - outside], 3),
    }


def cpu(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


# ---------------------------------------------------------------------- runtimes


def eager(explainer: TTAME, images: Tensor) -> tuple[Call, Call]:
    model, module = explainer.model, explainer.as_module(images)
    return lambda: model(images), lambda: module(images)


def attribute(explainer: TTAME, images: Tensor) -> tuple[Call, Call]:
    model = explainer.model
    explainer.attribute(images)
    return lambda: model(images), lambda: explainer.attribute(images)


def compiled(explainer: TTAME, images: Tensor) -> tuple[Call, Call]:
    model = torch.compile(explainer.model, fullgraph=True)
    module = torch.compile(explainer.as_module(images), fullgraph=True)
    return lambda: model(images), lambda: module(images)


def onnxruntime(explainer: TTAME, images: Tensor) -> tuple[Call, Call]:
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        alone, explained = Path(folder) / "alone.onnx", Path(folder) / "explained.onnx"
        axes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(explainer.model, (images,), alone, dynamo=True, dynamic_shapes=axes, verbose=False)
        explainer.export(explained, images, any_size=False)
        cpu_only = ["CPUExecutionProvider"]
        sessions = [runtime.InferenceSession(str(path), options, providers=cpu_only) for path in (alone, explained)]
    array = images.numpy()
    plain, mapped = (lambda s=s: s.run(None, {s.get_inputs()[0].name: array}) for s in sessions)
    return plain, mapped


PAIRS = {"eager": eager, "attribute": attribute, "compiled": compiled, "onnxruntime": onnxruntime}


def table(found: dict[str, Any]) -> str:
    lines = ["| model | runtime | model alone, ms | with map, ms | ratio [95 %] |", "|---|---|---|---|---|"]
    for name, runtimes in found.items():
        if isinstance(runtimes, dict):
            lines += [
                f"| {name} | {runtime} | {row['alone_ms']} | {row['with_map_ms']} | {row['ratio']} "
                f"[{row['low']}, {row['high']}] |"
                for runtime, row in runtimes.items()
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
