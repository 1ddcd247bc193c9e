"""What was done to the library to make it lose or let in something, how often, and what happened.

Usage: python benchmarks/faults.py [PART ...] [--times 20] [--work FOLDER] [--page docs/explanation/faults.md]

Kills fits, evaluations and explanations at random moments and runs them again; flips bits, cuts and edits files; gives
hostile photographs, names and options; starts two runs at once; measures memory and time against the number of
classes. Every part keeps what it found in FOLDER/faults.json and is not done again, so that the whole may be run in
pieces; --page writes the table of all that is known. Everything is on the CPU, with models of a few kilobytes.
"""

# ruff: noqa: B023  # what is defined in a loop here is called in the same turn
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

from attrib_zoo import TTAME
from attrib_zoo.cli import main as command
from attrib_zoo.errors import AttribZooError, CheckpointError, DataError
from attrib_zoo.models.photos import find_photos, is_photo, open_photo, own_stems
from attrib_zoo.training.checkpoint import Checkpoint, read, write
from attrib_zoo.training.sealed import read_metadata

MODEL = "test_resnet"
PLACES = ("fit", "evaluate", "explain")
Row = dict[str, Any]


# ---------------------------------------------------------------------- processes


def forked(work: Callable[[], Any], log: Path) -> int:
    """Run in a child that has all modules already; its output goes to a file. Returns its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, within: float = 300.0) -> int:
    """The exit code of a child, or minus the signal that ended it; it is killed where it does not end."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -999


def quietly(words: list[str]) -> tuple[int, str]:
    """A command in this process: its exit code and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(words)
    return code, err.getvalue().strip()


# ---------------------------------------------------------------------- what is worked on


class Files:
    """A model, twelve photographs, an explainer and a checkpoint."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "files"
        self.weights, self.photos = self.folder / "w.pth", self.folder / "photos"
        if not self.weights.exists():
            self.photos.mkdir(parents=True, exist_ok=True)
            for seed in range(12):
                pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC).save(self.photos / f"p{seed}.png")
            torch.manual_seed(0)
            torch.save(timm.create_model(MODEL, num_classes=5).state_dict(), self.weights)
        self.usual = ["--model", MODEL, "--weights", str(self.weights), "--device", "cpu"]

    def words(self, what: str, folder: Path) -> list[str]:
        """A command that writes into a folder, and continues there if it is run again."""
        if what == "fit":
            words = ["fit", "--data", str(self.photos), "--output", str(folder / "x.safetensors"), "--recipe", "paper"]
            words += ["--max-steps", "12", "--batch-size", "2", "--workers", "0", "--checkpoint-every", "2"]
            return [*words, "--checkpoint-dir", str(folder / "c"), "--resume", str(folder / "c"), *self.usual]
        if what == "evaluate":
            words = [
                "evaluate",
                "--data",
                str(self.photos),
                "--output",
                str(folder),
                "--metrics",
                "ad",
                "--max-images",
                "4",
            ]
            return [*words, "--method", "gradcam", "--batch-size", "2", *self.usual]
        photos = [str(self.photos / f"p{number}.png") for number in range(4)]
        return ["explain", *photos, "--output", str(folder), "--method", "gradcam", "--batch-size", "2", *self.usual]

    def result(self, what: str, folder: Path) -> Any:
        """What must be the same, however often the command was killed."""
        if what == "fit":
            found = read(folder / "x.safetensors")
            return {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()}, found.facts
        if what == "evaluate":
            return (folder / "table.csv").read_text()
        return {p.name: Image.open(p).convert("RGB").tobytes() for p in sorted(folder.rglob("*.png"))}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name.endswith(".part") or p.name.endswith(".lock")]


# ---------------------------------------------------------------------- parts


def kills(files: Files, work: Path, times: int, what: str) -> list[Row]:
    """Kill at a random moment, by SIGKILL, SIGTERM or SIGHUP in turn; run again to the end; compare."""
    straight = fresh(work / f"{what}-straight")
    (straight / "c").mkdir()
    begun = time.monotonic()
    if ended(forked(lambda: command(files.words(what, straight)), work / "log")):
        raise SystemExit((work / "log").read_text())
    length = time.monotonic() - begun
    wanted = files.result(what, straight)
    kept, rows = Kept(work / f"kills-{what}.json"), []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        for turn in kept.turns(number.name, times if number is signal.SIGKILL else max(1, times // 4)):
            at = random.Random(f"{what} {number} {turn}").uniform(0.1, 0.95) * length
            kept.add(number.name, killed(files, work, what, number, at, wanted))
        rows.append(row(f"{what}: {number.name} at a random moment, run again", kept.found(number.name)))
    return rows


def killed(files: Files, work: Path, what: str, number: signal.Signals, at: float, wanted: Any) -> str:
    """One command, killed after so many seconds, and run again: how that went."""
    folder = fresh(work / f"{what}-killed")
    (folder / "c").mkdir()
    child = forked(lambda: command(files.words(what, folder)), work / "log")
    time.sleep(at)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    code = ended(child)
    if code == 0:
        return "had ended before"
    if code == 1 and "stopped by" not in (work / "log").read_text():
        return "stopped WITHOUT a sentence"
    if ended(forked(lambda: command(files.words(what, folder)), work / "log")):
        return f"could NOT be continued: {(work / 'log').read_text()[-200:]}"
    if files.result(what, folder) != wanted:
        return "ANOTHER result"
    return "same result, files LEFT BEHIND" if leftovers(folder) else "continued to the same result"


class Kept:
    """Counts that are kept in a file after each turn, so that many turns can be done in pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}

    def turns(self, name: str, times: int) -> Iterator[int]:  # noqa: D102
        while (turn := sum(self.counts.get(name, {}).values())) < times:
            yield turn

    def add(self, name: str, result: str) -> None:  # noqa: D102
        counts = self.counts.setdefault(name, {})
        counts[result] = counts.get(result, 0) + 1
        self.path.write_text(json.dumps(self.counts))

    def found(self, name: str) -> Counter[str]:  # noqa: D102
        return Counter(self.counts[name])


def pairs(files: Files, work: Path, times: int) -> list[Row]:
    """Kill one of two processes of a fit; the other must end soon and say why; continue both; compare."""
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = timm.create_model(MODEL, num_classes=5)
    model.load_state_dict(torch.load(files.weights, weights_only=True))

    def one(rank: int, folder: Path, meeting: str) -> int:
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{folder}/{meeting}", rank=rank, world_size=2)
        plan: Any = {"max_steps": 12, "schedule": "short", "checkpoint_every": 2, "show_progress": False}
        resume = folder if (folder / "checkpoint.safetensors").exists() else None
        explainer = TTAME(model, recipe="paper", psi="own")
        try:
            explainer.fit(list(images[rank::2].split(2)), checkpoint_dir=folder, resume_from=resume, **plan)
        except AttribZooError as error:
            print(error)
            sys.stdout.flush()
            os._exit(3)
        if rank == 0:
            explainer.save(folder / "x.safetensors")
        sys.stdout.flush()
        os._exit(0)

    def both(folder: Path, meeting: str) -> list[int]:
        return [forked(lambda rank=rank: one(rank, folder, meeting), work / f"log{rank}") for rank in (0, 1)]

    straight = fresh(work / "pair-straight")
    begun = time.monotonic()
    codes = [ended(child) for child in both(straight, "first")]
    length = time.monotonic() - begun
    if any(codes):
        raise SystemExit((work / "log0").read_text())
    wanted = load_file(straight / "x.safetensors")
    draw, kept, slowest = random.Random(2), Kept(work / "pairs.json"), 0.0
    for turn in kept.turns("pairs", times):
        folder = fresh(work / "pair-killed")
        children = both(folder, "first")
        time.sleep(draw.uniform(0.3, 0.95) * length)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[turn % 2], signal.SIGKILL)
        begun = time.monotonic()
        left = ended(children[1 - turn % 2], within=90)
        slowest = max(slowest, time.monotonic() - begun)
        ended(children[turn % 2])
        said = (work / f"log{1 - turn % 2}").read_text()
        if left not in (0, 3) or "Traceback" in said:
            kept.add("pairs", f"the other one ended with {left}: {said[-150:]}")
        elif any([ended(child) for child in both(folder, "second")]):  # a list: both are waited for
            kept.add("pairs", f"could NOT be continued: {(work / 'log0').read_text()[-150:]}")
        else:
            same = load_file(folder / "x.safetensors")
            equal = all(torch.equal(value, same[name]) for name, value in wanted.items())
            result = "one sentence, continued to the same bits" if equal else "continued to OTHER bits"
            kept.add("pairs", "had ended before" if left == 0 else result)
    return [
        row(f"fit in two processes: one killed (the other ended after {slowest:.1f} s at most)", kept.found("pairs"))
    ]


def bits(files: Files, work: Path, times: int) -> list[Row]:
    """Flip one bit, cut, or edit; the file must be refused with a sentence or give the same maps."""
    explainer, checkpoint = prepared(files, work)
    rows, draw = [], random.Random(3)
    for path, use, name in ((explainer, loads(files), "explainer"), (checkpoint, resumes(files), "checkpoint")):
        data = path.read_bytes()
        damaged = path.with_name("damaged.safetensors")
        header = 8 + int.from_bytes(data[:8], "little")
        count = 25 * times if name == "explainer" else 5 * times
        for part, low, high, share in (("tensors", header, len(data), 0.7), ("header", 0, header, 0.3)):
            found: Counter[str] = Counter()
            for _ in range(round(share * count)):
                spoilt = bytearray(data)
                spoilt[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
                damaged.write_bytes(spoilt)
                found[use(damaged)] += 1
            rows.append(row(f"{name}: one bit flipped in its {part}", found))
        found = Counter()
        for _ in range(5 * times):
            damaged.write_bytes(data[: draw.randrange(len(data))])
            found[use(damaged)] += 1
        rows.append(row(f"{name}: cut off anywhere", found))
    return rows


def edits(files: Files, work: Path, times: int) -> list[Row]:
    """Change or remove one of the values that the header says; with the old checksum, a new one, and none at all."""
    explainer, checkpoint = prepared(files, work)
    rows, draw = [], random.Random(4)
    junk = [None, True, -1, 0, 3_000_000, 10**9, 2**70, 1e308, float("nan"), "", "x", [], {}, [1], {"a": 1}, [[[]]]]
    for path, use, name in ((explainer, loads(files), "explainer"), (checkpoint, resumes(files), "checkpoint")):
        text, seal = read_metadata(path)
        facts, tensors = json.loads(text or ""), read(path).tensors
        places = [place for place in every_place(facts) if place]
        edited = path.with_name("edited.safetensors")
        for how in ("its old checksum", "a new checksum", "none, as version 0.1"):
            found: Counter[str] = Counter()
            for _ in range(5 * times):
                changed = change(facts, draw.choice(places), draw.choice(junk), draw.random() < 0.3)
                if how == "its old checksum":
                    save_file(tensors, edited, {"attrib_zoo": json.dumps(changed), "sha256": seal or ""})
                elif how == "a new checksum":
                    write(edited, Checkpoint(tensors, {k: v for k, v in changed.items() if k != "format"}))
                else:
                    save_file(tensors, edited, {"attrib_zoo": json.dumps({**changed, "format": 1})})
                result = use(edited)
                found["another map" if result == "another map" and how == "its old checksum" else result] += 1
            rows.append(row(f"{name}: one value of the metadata edited, with {how}", found))
    return rows


def results(files: Files, work: Path, times: int) -> list[Row]:
    """Edit, delete or move a line of a results file; run again."""
    folder = fresh(work / "results")
    if quietly(files.words("evaluate", folder))[0]:
        raise SystemExit("evaluate failed")
    path, draw, rows = folder / "results.jsonl", random.Random(5), []
    lines = path.read_text().splitlines()

    def digit(kept: list[str]) -> None:
        place = draw.randrange(1, len(kept))
        at = draw.choice([i for i, c in enumerate(kept[place]) if c.isdigit()])
        kept[place] = kept[place][:at] + str((int(kept[place][at]) + 1) % 10) + kept[place][at + 1 :]

    def swap(kept: list[str]) -> None:
        one = draw.randrange(1, len(kept) - 1)
        kept[one], kept[one + 1] = kept[one + 1], kept[one]

    ways = {
        "a digit changed": digit,
        "a line deleted (not the last)": lambda kept: kept.pop(draw.randrange(0, len(kept) - 1)),
        "two lines swapped": swap,
    }
    for name, spoil in ways.items():
        found: Counter[str] = Counter()
        for _ in range(max(5, times // 2)):
            kept = list(lines)
            spoil(kept)
            path.write_text("\n".join(kept) + "\n")
            code, said = quietly(files.words("evaluate", folder))
            found[verdict(code, said)] += 1
        rows.append(row(f"results file: {name}", found))
    return rows


def photographs(files: Files, work: Path, times: int) -> list[Row]:
    """Files and folders that are no photographs, or photographs of huge cost."""
    rows = []
    for name, make in HOSTILE.items():
        folder = fresh(work / "hostile")
        photos = folder / "photos"
        shutil.copytree(files.photos, photos)
        make(photos)

        def look(photos: Path = photos) -> int:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before = status("VmRSS")
            for path in find_photos([photos]):
                if is_photo(path):
                    with contextlib.suppress(DataError):
                        open_photo(path)
            words = ["explain", str(photos), "--output", str(folder / "out"), *files.usual]
            code, said = quietly(words)
            (folder / "said").write_text(f"{verdict(code, said)}\n{status('VmHWM') - before}")
            return 0

        begun = time.monotonic()
        code = ended(forked(look, work / "log"), within=120)
        took = time.monotonic() - begun
        said, peak = (folder / "said").read_text().split("\n") if code == 0 else (f"ended with {code}", "0")
        more = float(peak) / 1e9
        rows.append(row(f"photographs: {name} ({took:.0f} s, {more:.2f} GB)", Counter([said])))
    return rows


def names(files: Files, work: Path, times: int) -> list[Row]:
    """Class names, options and file names that do something to a terminal, a spreadsheet or a reader of YAML."""
    rows = []
    for name, value in CLASS_NAMES.items():
        folder = fresh(work / "names")
        (folder / "names.json").write_text(json.dumps([value, "b", "c", "d", "e"]))
        out = io.StringIO()
        words = ["explain", str(files.photos), "--output", str(folder / "o"), "--target", "0", *files.usual]
        words += ["--method", "gradcam,layercam"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = command([*words, "--classes", str(folder / "names.json")])
        text = out.getvalue()
        safe = all(c.isprintable() or c in "\n…" for c in text) and max(map(len, text.splitlines())) < 1000
        rows.append(row(f"class name: {name}", Counter(["printed escaped" if code == 0 and safe else "NOT SAFE"])))
    for name, text in CONFIGS.items():
        folder = fresh(work / "configs")
        (folder / "c.yaml").write_text(text)
        begun = time.monotonic()
        code, said = quietly(["explain", str(files.photos), "--config", str(folder / "c.yaml")])
        took = time.monotonic() - begun
        rows.append(row(f"--config: {name} ({took:.1f} s)", Counter([verdict(code, said)])))
    begun = time.monotonic()
    own_stems([Path(str(i), "a.png") for i in range(200_000)])
    rows.append(row("file names: 200 000 photographs of one name", Counter([f"{time.monotonic() - begun:.1f} s"])))
    folder = fresh(work / "many")
    for i in range(50_000):
        (folder / f"{i}.png").touch()
    begun = time.monotonic()
    find_photos([folder])
    rows.append(row("file names: 50 000 in one folder", Counter([f"{time.monotonic() - begun:.1f} s"])))
    shutil.rmtree(folder)
    return rows


def locks(files: Files, work: Path, times: int) -> list[Row]:
    """Start the same command twice at once; one must end well, the other with a sentence."""
    rows = []
    for what in PLACES:
        found: Counter[str] = Counter()
        for _ in range(max(3, times // 4)):
            folder = fresh(work / "twice")
            (folder / "c").mkdir()
            children = [
                forked(lambda folder=folder: command(files.words(what, folder)), work / f"log{i}") for i in (0, 1)
            ]
            codes = [ended(child) for child in children]
            said = "".join((work / f"log{i}").read_text() for i in (0, 1))
            again = ended(forked(lambda folder=folder: command(files.words(what, folder)), work / "log"))
            fine = sorted(codes) == [0, 2] and "is in use by process" in said and again == 0
            found["one ran, one was told who holds it" if fine else f"{codes}, then {again}"] += 1
        rows.append(row(f"{what}: two at once into one folder", found))
    return rows


def scale(files: Files, work: Path, times: int) -> list[Row]:
    """Memory and time against the number of classes, each in a process of its own."""
    rows = []
    for classes in (1000, 21_841):
        for what, measure in SCALE.items():
            path = work / "measured.json"
            path.unlink(missing_ok=True)
            code = ended(forked(lambda m=measure, k=classes: m(k, work, path), work / "log"), within=600)
            said = json.loads(path.read_text())["said"] if code == 0 else f"ended with {code}"
            rows.append(row(f"K = {classes}: {what}", Counter([said])))
    return rows


# ---------------------------------------------------------------------- measured


def peak_of(call: Callable[[], Any]) -> tuple[float, float]:
    """Bytes of memory that a call holds at its peak beyond what was there, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    begun = time.monotonic()
    kept = call()
    took = time.monotonic() - begun
    found = status("VmHWM") - before
    del kept
    return found, took


def status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return 1024.0 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(name)))


class Wide(torch.nn.Module):
    """One convolution and very many classes."""

    def __init__(self, classes: int, width: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, width, 16, 16), torch.nn.ReLU())
        self.head = torch.nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.head(self.stem(x).mean((2, 3)))


def measure_maps(classes: int, work: Path, path: Path) -> int:
    warnings.simplefilter("ignore")
    images = torch.randn(1, 3, 448, 448)
    explainer = TTAME(Wide(classes), ["stem"], recipe="paper").fit([images], max_steps=1, show_progress=False)
    explainer.maps(images[..., :64, :64])
    size = 4.0 * classes * 28 * 28
    peak, took = peak_of(lambda: explainer.maps(images))
    return told(path, f"{took:.2f} s, {size / 1e6:.0f} MB of maps, peak {peak / size:.2f} x")


def measure_steps(classes: int, work: Path, path: Path) -> int:
    warnings.simplefilter("ignore")
    loader = [torch.randn(8, 3, 64, 64) for _ in range(4)]
    found = {}
    for recipe in ("rows", "paper"):
        explainer = TTAME(Wide(classes), ["stem"], recipe=recipe)
        begin: Any = {"show_progress": False, "schedule": "short"}
        few, many = (peak_of(lambda n=n: explainer.fit(loader, max_steps=n, **begin)) for n in (2, 12))
        found[recipe] = ((many[1] - few[1]) / 10, many[0])
    text = ", ".join(f"recipe {name}: {took:.3f} s a step, {peak / 1e9:.2f} GB" for name, (took, peak) in found.items())
    return told(path, text)


def measure_checkpoint(classes: int, work: Path, path: Path) -> int:
    tensors = {f"network/{i}": torch.randn(classes, 512) for i in range(3)}
    size = 4.0 * 3 * classes * 512
    saved = work / "big.safetensors"
    peak, took = peak_of(lambda: write(saved, Checkpoint(tensors, {"a": 1})))
    back, slow = peak_of(lambda: read(saved))
    saved.unlink()
    text = f"{size / 1e6:.0f} MB written in {took:.2f} s, {peak / size:.2f} x of memory more"
    return told(path, f"{text}; read in {slow:.2f} s, {back / size:.2f} x")


def told(path: Path, said: str) -> int:
    path.write_text(json.dumps({"said": said}))
    return 0


SCALE = {"maps of all classes": measure_maps, "a fit": measure_steps, "a checkpoint": measure_checkpoint}


# ---------------------------------------------------------------------- hostile things


def png(size: tuple[int, int], mode: str = "1") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        Image.new(mode, size).save(folder / "z.png")
        Image.MAX_IMAGE_PIXELS = before

    return make


def linked(folder: Path) -> None:
    (folder / "d").mkdir()
    for name in "ab":
        (folder / "d" / name).symlink_to(".")


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a pipe named pipe.jpg": lambda folder: os.mkfifo(folder / "pipe.jpg"),
    "two folders that link to themselves": linked,
    "a link to itself": lambda folder: (folder / "loop.png").symlink_to("loop.png"),
    "a link that leads nowhere": lambda folder: (folder / "gone.png").symlink_to("nowhere.png"),
    "a link to /dev/zero": lambda folder: (folder / "zero.png").symlink_to("/dev/zero"),
    "1 x 5000 pixels": png((1, 5000), "RGB"),
    "5000 x 1 pixels": png((5000, 1), "RGB"),
    "13300 x 13300 pixels": png((13_300, 13_300)),
    "30000 x 30000 pixels": png((30_000, 30_000)),
    "9400 x 9400 pixels, within the limit": png((9400, 9400)),
    "a folder named x.png": lambda folder: (folder / "x.png").mkdir(),
    "an empty file": lambda folder: (folder / "empty.jpg").touch(),
    "text": lambda folder: (folder / "text.jpg").write_text("GIF89a and then nothing"),
    "a header and no pixels": lambda folder: (folder / "h.png").write_bytes((folder / "p0.png").read_bytes()[:60]),
    "a file name with an escape sequence": lambda folder: shutil.copy(folder / "p0.png", folder / "\x1b[2J.png"),
    "a file name that is no UTF-8": lambda folder: shutil.copy(
        folder / "p0.png", os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    ),
}

CLASS_NAMES = {
    "5000 characters": "x" * 5000,
    "a lone surrogate": "\ud800",
    "terminal escapes": "\x1b[2J\x1b]0;title\x07",
    "a carriage return and a bell": "a\rb\x07",
    "reversed writing": "\u202ecba",
    "a formula": "=cmd|'/c calc'!A0",
    "markup": "<script>alert(1)</script>",
    "a line break": "one\ntwo",
    "mathematics": "$\\frac{",
}

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {
    "anchors that name each other nine times": BOMB,
    "a thousand brackets": f"model: {'[' * 1000}{']' * 1000}",
    "2 MB": "model: " + "x" * 2**21,
    "no YAML": "model: [",
    "an object of Python": "model: !!python/object/apply:os.system ['true']",
}


# ---------------------------------------------------------------------- judged


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def row(what: str, found: Counter[str]) -> Row:
    print(f"{what}: {dict(found)}", flush=True)
    return {"what": what, "times": sum(found.values()), "found": dict(found)}


def verdict(code: int, said: str) -> str:
    if code == 0:
        return "it ran"
    whole = [line for line in said.splitlines() if not line.startswith("warning: ")]
    if code == 2 and len(whole) == 1 and "should not happen" not in said and "Traceback" not in said:
        return "refused with one sentence"
    return f"NOT WELL ({code}): {said[-150:]}"


def network(files: Files) -> torch.nn.Module:
    model = timm.create_model(MODEL, num_classes=5)
    model.load_state_dict(torch.load(files.weights, weights_only=True))
    return model.eval()


IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
PLAN: dict[str, Any] = {"max_steps": 4, "schedule": "short", "show_progress": False}


def prepared(files: Files, work: Path) -> tuple[Path, Path]:
    """An explainer's file, and the checkpoint of a fit that stopped in its middle."""
    folder = fresh(work / "damaged")

    class Stops(list[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            yield from list(super().__iter__())[:2]
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = TTAME(network(files), recipe="paper").fit([IMAGES], **{**PLAN, "max_steps": 2})
        with contextlib.suppress(KeyboardInterrupt):
            TTAME(network(files), recipe="paper").fit(Stops(IMAGES.split(2)), checkpoint_dir=folder, **PLAN)
    return explainer.save(folder / "explainer.safetensors"), folder / "checkpoint.safetensors"


def loads(files: Files) -> Callable[[Path], str]:
    model = network(files)
    wanted: list[torch.Tensor] = []

    def use(path: Path) -> str:
        if not wanted:
            wanted.append(TTAME.load(path.with_name("explainer.safetensors"), model).maps(IMAGES))
        return used(lambda: TTAME.load(path, model), wanted[0])

    return use


def resumes(files: Files) -> Callable[[Path], str]:
    model = network(files)
    wanted: list[torch.Tensor] = []

    def resume(path: Path) -> TTAME:
        return TTAME(model, recipe="paper").fit(IMAGES.split(2), resume_from=path, **PLAN)

    def use(path: Path) -> str:
        if not wanted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted.append(resume(path.with_name("checkpoint.safetensors")).maps(IMAGES))
        return used(lambda: resume(path), wanted[0])

    return use


def used(make: Callable[[], TTAME], wanted: torch.Tensor) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = make().maps(IMAGES)
        except CheckpointError:
            return "refused with one sentence"
        except Exception as error:
            return f"NOT WELL: {type(error).__name__}: {str(error)[:100]}"
    return "the same maps" if torch.equal(found, wanted) else "another map"


def every_place(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from every_place(inner, (*path, key))


def change(facts: Any, place: tuple[Any, ...], value: Any, delete: bool) -> Any:
    facts = json.loads(json.dumps(facts))
    holder = facts
    for key in place[:-1]:
        holder = holder[key]
    if delete:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return facts


# ---------------------------------------------------------------------- the page

HEAD = """# Faults

What was done to the library to make it lose something or let something in, how often, and what happened. Written by
`benchmarks/faults.py`, which anybody can run; on a CPU, with small models. [SECURITY.md](../../SECURITY.md) says what
is promised.

A checksum tells damage, not forgery: whoever edits a file and makes the checksum anew can say whatever an explainer
could have said, and so "another map" is no fault where the checksum is new or missing.

| what was done | times | what happened |
|---|---|---|
"""


FOOT = """
## A step against the number of classes

With the recipe `"rows"` a step trains what all classes share; the rows themselves are frozen, and what grows with K is
the model's own last layer. With the recipe `"paper"` the rows are trained, and a step does grow with K. For 21 841 rows
of 512 numbers, on one thread (seconds of CPU time):

| part of a step | PyTorch's default | now |
|---|---|---|
| SGD with momentum, all rows | 0.111 | 0.011 |
| Adam, all rows | 0.176 | 0.016 |
| the gradient of the batch's rows, dense | 0.044 | 0.044 |
| the model's own last layer, there and back | 0.033 | 0.033 |

The optimiser goes over the rows once (`fused=True`) and makes no temporary tensors of their size. In 50 steps on 2000
rows of 64 with random gradients SGD came to the same bits as PyTorch's default, Adam to 2.4e-7 at most; a checkpoint
from before is continued as it was begun. The row "a fit" of 21 841 classes above is from before.

Rows that a batch does not touch are not passed over, since the result would not be the same. Momentum goes on moving
every row that ever had a gradient, and the random other classes of Ψ, B - 1 for each of B images, leave hardly any row
without one after some K / B² steps. What SGD does to a row while nothing touches it is a 2 x 2 matrix on the row and
its momentum, so it could be made up for when the row is next used, but with other rounding, which a validation or a
checkpoint in between would change again. For Adam there is no such form, because its divisor changes too. With a sparse
gradient, which takes 0.0003 s, that would save 0.055 s of a step, about what the model's last layer costs, which sees
the image and the masked image in any case. Where images are few for so many classes,
`recipe="auto"` takes the rows of the classifier anyway.
"""


def page(found: dict[str, list[Row]]) -> str:
    lines = [
        f"| {entry['what']} | {entry['times']} | "
        + "; ".join(f"{said}: {n}" if len(entry["found"]) > 1 else said for said, n in entry["found"].items())
        + " |"
        for name in PARTS
        for entry in found.get(name, [])
    ]
    return HEAD + "\n".join(lines) + "\n" + FOOT


PARTS: dict[str, Callable[[Files, Path, int], list[Row]]] = {
    **{f"kill-{what}": lambda files, work, times, w=what: kills(files, work, times, w) for what in PLACES},
    "pairs": pairs,
    "locks": locks,
    "bits": bits,
    "edits": edits,
    "results": results,
    "photographs": photographs,
    "names": names,
    "scale": scale,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("faults"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "faults.json"
    found: dict[str, list[Row]] = json.loads(kept.read_text()) if kept.exists() else {}
    files = Files(options.work)
    for name in options.parts or ([] if options.page else PARTS):
        if name not in found:
            found[name] = PARTS[name](files, options.work, options.times)
            kept.write_text(json.dumps(found, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
