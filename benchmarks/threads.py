"""Explanations from many threads on one model: wrong maps, what other threads notice, and what it costs.

Usage: python benchmarks/threads.py [--parts wrong others cost throughput] [--calls 64] [--output threads.json]

For each number of threads, the maps of concurrent calls are compared bit by bit with those of serial ones, for a model
in eval mode and in training mode as torchvision makes it. Then: predictions and training of another thread meanwhile,
the time of a single-threaded call relative to a plain forward pass, and calls per second.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from attrib_zoo import GradCAM, LayerCAM, RISE, ScoreCAM

THREADS = (1, 2, 4, 8, 16)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "setting": f"{os.cpu_count()} cores, one compute thread per call; torch {torch.__version__}"
    }
    for part in options.parts:
        found[part] = PARTS[part](options.calls)
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return resnet18(num_classes=10)


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "GradCAM": GradCAM,
    "LayerCAM": LayerCAM,
    "RISE": lambda model: RISE(model, n_masks=8),
    "ScoreCAM": lambda model: ScoreCAM(model, layers="layer1.0.conv1"),
}


def wrong_maps(calls: int) -> dict[str, Any]:
    """For each mode, method and number of threads: calls that raised, and maps that are not those of serial calls."""
    found: dict[str, Any] = {}
    batch = images(8, 32)
    for mode in ("eval", "training"):
        for name, make in METHODS.items():
            for threads in THREADS:
                model = network().train(mode == "training")
                twin = copy.deepcopy(model).eval()
                wanted = [make(twin).attribute(batch[i : i + 1], target=1) for i in range(len(batch))]
                before = {key: value.clone() for key, value in model.state_dict().items()}
                modes = [module.training for module in model.modules()]
                explainer, counts = make(model), {"raised": 0, "wrong": 0}

                def call(
                    number: int, explainer: Any = explainer, wanted: list[Tensor] = wanted, counts: Any = counts
                ) -> None:
                    i = number % len(wanted)
                    try:
                        counts["wrong"] += not torch.equal(explainer.attribute(batch[i : i + 1], target=1), wanted[i])
                    except Exception:
                        counts["raised"] += 1

                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(call, range(calls)))
                counts["buffers moved"] = sum(
                    not torch.equal(value, before[key]) for key, value in model.state_dict().items()
                )
                counts["modes changed"] = sum(
                    module.training != was for module, was in zip(model.modules(), modes, strict=True)
                )
                found[f"{mode}, {name}, {threads} threads, of {calls}"] = counts
    return found


def others(_: int) -> dict[str, Any]:
    """What a second thread's predictions and training notice of explanations in the first."""
    found: dict[str, Any] = {}
    for mode in ("eval", "training"):
        model = network().train(mode == "training")
        twin, batch = copy.deepcopy(model), images(8, 32)
        counts = {"raised": 0, "wrong": 0}
        started = threading.Barrier(2)
        stop = threading.Event()

        def explain(model: nn.Module = model, started: Any = started, stop: Any = stop, batch: Tensor = batch) -> None:
            explainer = RISE(model, n_masks=64)
            started.wait()
            while not stop.is_set():
                explainer.attribute(batch[:2], target=1)

        thread = threading.Thread(target=explain)
        thread.start()
        started.wait()
        for _ in range(30):
            same = _same(model, twin, batch)
            counts["raised" if same is None else "wrong"] += not same
        stop.set()
        thread.join()
        counts["batches counted, of 30"] = int(model.bn1.num_batches_tracked)
        found[mode] = counts
    return found


def _same(model: nn.Module, twin: nn.Module, batch: Tensor) -> bool | None:
    """Whether two models put out the same; None where one raises."""
    try:
        with torch.no_grad():
            return torch.equal(model(batch), twin(batch))
    except Exception:
        return None


def cost(_: int) -> dict[str, float]:
    """CPU time of GradCAM on one 224-pixel image as a multiple of a plain forward pass, taken alternately."""
    model, image = network().eval(), images(1, 224)
    explainer = GradCAM(model)
    times: dict[str, list[float]] = {"plain": [], "GradCAM": []}

    def plain() -> None:
        with torch.inference_mode():
            model(image)

    for repeat in range(43):
        for name, work in (("plain", plain), ("GradCAM", lambda: explainer.attribute(image, target=1))):
            start = time.process_time()
            work()
            if repeat > 2:
                times[name].append(time.process_time() - start)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {"GradCAM / forward": middle["GradCAM"] / middle["plain"], "forward, ms": 1e3 * middle["plain"]}


def throughput(calls: int) -> dict[str, float]:
    """Calls of GradCAM per second on one 224-pixel image each, from several threads; and with a lock around each."""
    model, image = network().eval(), images(1, 224)
    explainer, found = GradCAM(model), {}
    explainer.attribute(image, target=1)
    lock = threading.Lock()
    for name, guard in (("threads", nullcontext), ("threads, one lock", lambda: lock)):
        for threads in (1, 2, 4, 8):
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                done = list(pool.map(lambda _, guard=guard: _works(explainer, image, guard()), range(calls)))
                found[f"{threads} {name}"] = sum(done) / (time.perf_counter() - start)
    return found


def _works(explainer: Any, image: Tensor, guard: Any) -> bool:
    try:
        with guard:
            explainer.attribute(image, target=1)
    except Exception:
        return False
    return True


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "wrong": wrong_maps,
    "others": others,
    "cost": cost,
    "throughput": throughput,
}

if __name__ == "__main__":
    main(sys.argv[1:])
