"""``attrib-zoo explain`` over a folder of many photographs: its memory over time, a kill in the middle, its throughput.

    python benchmarks/folder_job.py scale --folder /tmp/job --photos 10000
    python benchmarks/folder_job.py throughput --folder /tmp/job --model resnet18 --photos 512

``scale`` makes the photographs, starts the job, kills it (SIGKILL) when half of them are done, continues it with
``--resume``, and checks that each photograph has one row and its map. ``throughput`` alternates the job and a loop
that only predicts, both with the job's own loader in this process, and prints the ratio of their times.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from attrib_zoo import TTAME, GradCAM
from attrib_zoo.cli.explain import _lines, _Task
from attrib_zoo.cli.parts import Job
from attrib_zoo.cli.stream import Batch, Names, loader, watched
from attrib_zoo.models import load


def photographs(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """So many JPEG files of soft colours, a thousand in a folder; three of them damaged."""
    place = folder / f"photos-{count}-{size[0]}x{size[1]}"
    for i in range(count):
        path = place / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=85)
        if i in (count // 3, count // 2, count - 1):
            path.write_bytes(path.read_bytes()[:200])
    return place


def model_file(folder: Path, name: str) -> Path:
    import timm

    path = folder / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        from torchvision import models

        known = name in models.list_models(module=models)
        model = models.get_model(name, weights=None) if known else timm.create_model(name, num_classes=100)
        torch.save(model.state_dict(), path)
    return path


def memory_of(pid: int) -> float:
    """MiB of a process and its children: memory of their own, without the libraries that other processes share."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for one in (str(pid), *children):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                total += int(line.split()[1]) / 1024
    return total


def done_of(output: Path) -> int:
    notes = [json.loads(path.read_text()) for path in (output / "job").glob("[0-9]*.json")]
    return sum(note["stop"] - note["start"] for note in notes)


def watch(words: list[str], output: Path, stop_at: int | None) -> list[tuple[float, int, float]]:
    """Run the command; (seconds, photographs done, MiB) over time. Killed when so many are done."""
    process = subprocess.Popen([sys.executable, "-m", "attrib_zoo", *words], stdout=subprocess.PIPE, text=True)
    begun, seen = time.monotonic(), []
    while process.poll() is None:
        time.sleep(2)
        try:
            seen.append((time.monotonic() - begun, done_of(output), memory_of(process.pid)))
        except (OSError, ValueError):
            continue
        if stop_at is not None and seen[-1][1] >= stop_at:
            process.send_signal(signal.SIGKILL)
            break
    said = process.communicate()[0]
    print(f"exit code {process.returncode} after {time.monotonic() - begun:.0f} s\n{said}")
    return seen


def scale(folder: Path, count: int, name: str, workers: int) -> None:
    photos, weights, output = photographs(folder, count, (96, 72)), model_file(folder, name), folder / "out"
    words = ["explain", str(photos), "--model", name, "--weights", str(weights), "--output", str(output)]
    words += ["--no-pictures", "--maps", "safetensors", "--table", "jsonl", "--batch-size", "16"]
    words += ["--workers", str(workers), "--skip-bad", "--resume", "--method", "gradcam"]
    for stop_at in (count // 2, None):
        seen = watch(words, output, stop_at)
        for second, done, memory in seen[:: max(1, len(seen) // 12)]:
            print(f"{second:7.0f} s {done:7d} photographs {memory:7.0f} MiB")
        late = [memory for _, done, memory in seen if done]
        if len(late) > 4:
            half = len(late) // 2
            print(f"mean of the halves: {statistics.mean(late[:half]):.0f}, {statistics.mean(late[half:]):.0f} MiB")
    rows = [json.loads(line) for path in sorted((output / "table").iterdir()) for line in path.open()]
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").open()]
    names = [row["photo"] for row in rows] + [entry["photo"] for entry in skipped]
    assert len(names) == len(set(names)) == count, (len(names), len(set(names)), count)
    assert len(skipped) == 3
    for path in (output / "maps").iterdir():
        held = load_file(path)["gradcam"]
        mine = [row["row"] for row in rows if row["file"] == f"maps/{path.name}"]
        assert sorted(mine) == list(range(len(held)))
        assert bool(torch.isfinite(held).all())
    loaded = load(name, weights=weights)
    for row in rows[:: max(1, len(rows) // 20)]:  # against attribute
        image = loaded.transform(Image.open(photos / row["photo"]))[None]
        want = GradCAM(loaded.model, upsample=False).attribute(image, row["class"])[0, 0]
        held = load_file(output / row["file"])
        got = held["gradcam"][row["row"]].float() * held["gradcam.scale"][row["row"]]
        assert torch.allclose(got, want, rtol=5e-3, atol=1e-3 * float(want.abs().max()))
    print(f"complete: {len(rows)} rows, {len(skipped)} skipped, each photograph once; maps are those of attribute")


def throughput(folder: Path, count: int, name: str, workers: int, rounds: int) -> None:
    photos, weights = photographs(folder, count, (320, 240)), model_file(folder, name)
    loaded = load(name, weights=weights)
    names = Names(sorted(path for path in photos.rglob("*.jpg") if path.stat().st_size > 200))
    images = torch.stack([loaded.transform(Image.open(path)) for path in list(names)[:8]])
    ttame = TTAME(loaded.model).fit([images], max_steps=0, show_progress=False)
    ttame.upsample = False
    asked = {"targets": None, "top_k": 1, "contrast": None, "score": "softmax", "colours": {}, "stems": None}
    task = _Task(names, "/", folder, loaded, {"ttame": ttame}, **asked, originals=frozenset(), enlarge=True)

    def batches() -> Iterator[Batch]:
        interval = [(0, len(names))]
        return watched(loader(names, interval, loaded.transform, None, batch_size=16, workers=workers))

    def predict() -> None:
        with torch.no_grad():
            for batch in batches():
                loaded.model(batch.images).softmax(1).argmax(1).tolist()

    def job(number: int) -> None:
        work = Job(folder / f"throughput-{os.getpid()}-{number}", {}, "safetensors", "jsonl")
        work.begin(False)
        part = work.part(0)
        for batch in batches():
            for line in _lines(task, batch):
                row = {"photo": task.shown(line.index), "class": line.classes[0], "confidence": 0.5}
                part.add(row, line.maps[0])
            part.reach(batch.interval[1])
            if part.due:
                part = part.write()
        part.write()

    job(-1)
    times = []
    for i in range(rounds):
        pair = []
        for call in (predict, lambda i=i: job(i)):
            begun = time.process_time() if workers == 0 else time.perf_counter()
            call()
            pair.append((time.process_time() if workers == 0 else time.perf_counter()) - begun)
        times.append(pair)
        print(f"predict {pair[0]:.1f} s, job {pair[1]:.1f} s, ratio {pair[1] / pair[0]:.3f}")
    ratios = [job / predict for predict, job in times]
    kind = "CPU seconds" if workers == 0 else "wall seconds"
    print(f"{name}, {len(names)} photographs, {workers} workers: median ratio {statistics.median(ratios):.3f} ({kind})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scale", "throughput"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=10_000)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if given.what == "scale":
        scale(given.folder, given.photos, given.model, given.workers)
    else:
        throughput(given.folder, given.photos, given.model, given.workers, given.rounds)
