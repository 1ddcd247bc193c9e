"""What was done to the library to make it lose or let in something, how often, and what happened.

Usage: python benchmarks/faults.py [PART ...] [--times 20] [--work FOLDER] [--page docs/explanation/faults.md]

Kills fits, evaluations and explanations at random moments and runs them again; flips bits, cuts and edits files; gives
hostile photographs, names and options; starts two runs at once, and calls from many threads; measures memory and time
against the number of classes. Every part keeps what it found in FOLDER/faults.json and is not done again, so that the
whole may be run in pieces; --page writes the table of all that is known. Everything is on the CPU, with models of a few
kilobytes.
"""

# ruff: noqa: B023  # what is defined in a loop here is called in the same turn
from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import socket
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
from safetensors.torch import save_file

from attrib_zoo import RISE, TTAME, GradCAM
from attrib_zoo.benchmark import evaluate
from attrib_zoo.cli import main as command
from attrib_zoo.errors import AttribZooError, CheckpointError, DataError, shown
from attrib_zoo.models.photos import find_photos, is_photo, open_photo, own_stems
from attrib_zoo.training.checkpoint import Checkpoint, read, write
from attrib_zoo.training.sealed import read_metadata
from threads import others, wrong_maps

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


def ended(child: int, within: float = 300.0, then: signal.Signals | None = None) -> int:
    """The exit code of a child, or minus the signal that ended it.

    Where it does not end by itself it gets the signal ``then``, and where that does not help it is killed.
    """
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    if then is not None:
        os.kill(child, then)
        return ended(child, within=60)
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
        words = ["explain", str(self.photos), "--output", str(folder), "--resume", "--table", "jsonl", "--maps", "npz"]
        return [*words, "--method", "gradcam", "--batch-size", "2", *self.usual]

    def result(self, what: str, folder: Path) -> Any:
        """What must be the same, however often the command was killed."""
        if what == "fit":
            found = read(folder / "x.safetensors")
            return {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()}, found.facts
        if what == "evaluate":
            return (folder / "table.csv").read_text()
        found = {p.name: Image.open(p).convert("RGB").tobytes() for p in sorted(folder.rglob("*.png"))}
        for path in (folder / "table").iterdir():
            for entry in map(json.loads, path.read_text().splitlines()):
                with np.load(folder / entry.pop("file")) as maps:  # which file holds it depends on who was killed when
                    found[f"{entry['photo']} map"] = maps["gradcam"][entry.pop("row")].tobytes()
                found[f"{entry['photo']} row"] = entry
        return found


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name.endswith(".part") or p.name.endswith(".lock")]


# ---------------------------------------------------------------------- parts


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


def kills(files: Files, work: Path, times: int) -> list[Row]:
    """Kill at random moments, by each signal; run again to the end; compare.

    The cases take turns, so that whoever stops early has some of each.
    """
    cases = [(what, several, number) for several in (False, True) for what in PLACES for number in SIGNALS]
    kept, wanted = Kept(work / "kills.json"), {}
    for what in PLACES:  # what is done once per process is done here, and not in each of the children
        (fresh(work / "warm") / "c").mkdir()
        quietly(files.words(what, work / "warm"))
        MEMBERS[what](files, fresh(work / "warm"), 0)
    for turn in range(times):
        for what, several, number in cases:
            name = f"{what}{' in two processes' if several else ''}: {number.name}"
            if turn < sum(kept.counts.get(name, {}).values()):
                continue
            if (what, several) not in wanted:
                wanted[what, several] = straight(files, work, what, several)
            length, result = wanted[what, several]
            draw = random.Random(f"{name} {turn}")
            kept.add(name, killed(files, work, what, several, number, draw, length, result))
            print(turn, name, kept.counts[name], flush=True)
    return kill_rows(kept)


def kill_rows(kept: Kept) -> list[Row]:
    """The table of what is known of the kills, finished or not."""
    how = {False: "at a random moment", True: "to one of them at a random moment"}
    rows = []
    for name in sorted(kept.counts, key=lambda name: ("two" in name, PLACES.index(name.split(":")[0].split()[0]))):
        several = "two processes" in name and "SIGKILL" in name
        rows.append(row(f"{name} {how[several]}, run again", kept.found(name)))
    return rows


def straight(files: Files, work: Path, what: str, several: bool) -> tuple[float, Any]:
    """A run that nobody kills: its length in seconds and its result."""
    folder = fresh(work / f"{what}-straight")
    (folder / "c").mkdir()
    begun = time.monotonic()
    codes = [ended(child) for child in started(files, work, what, several, folder)]
    if any(codes):
        raise SystemExit((work / "log0").read_text())
    return time.monotonic() - begun, files.result(what, folder)


def started(files: Files, work: Path, what: str, several: bool, folder: Path) -> list[int]:
    """The command in one process, or the work in two that know of each other as those of ``torchrun`` do."""
    if not several:
        return [forked(lambda: command(files.words(what, folder)), work / "log0")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> int:
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in about.items()})
        if what != "explain":  # the command joins the group by itself
            dist.init_process_group("gloo")
        code = MEMBERS[what](files, folder, rank)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a group whose other half is gone is not left in good order

    return [forked(lambda rank=rank: member(rank), work / f"log{rank}") for rank in (0, 1)]


def killed(
    files: Files,
    work: Path,
    what: str,
    several: bool,
    number: signal.Signals,
    draw: random.Random,
    length: float,
    wanted: Any,
) -> str:
    """One run, killed at a random moment, and run again: how that went.

    Of two processes one gets SIGKILL, and the other what ``torchrun`` sends then, SIGTERM, if it has not ended by
    itself ten seconds later; the other signals go to both, as ``torchrun`` hands them on.
    """
    for _ in range(10):
        folder = fresh(work / f"{what}-killed")
        (folder / "c").mkdir()
        children = started(files, work, what, several, folder)
        time.sleep(draw.uniform(0.1, 0.95) * length)
        first = draw.randrange(len(children))
        aimed = [children[first]] if number is signal.SIGKILL else children
        for child in aimed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        codes = {first: ended(children[first])}
        for i, child in enumerate(children):
            if i != first:
                codes[i] = ended(child, within=10, then=signal.SIGTERM) if number is signal.SIGKILL else ended(child)
        if any(codes.values()):
            break
        length *= 0.8  # it was quicker than the one that was not killed
    else:
        return "was never caught"
    said = {i: (work / f"log{i}").read_text() for i in codes}
    wrong = [i for i, code in codes.items() if code > 0 and (code == 70 or "Traceback" in said[i])]
    if wrong:
        return f"stopped WITHOUT a sentence: {said[wrong[0]].strip()[-120:]}"
    again = [ended(child) for child in started(files, work, what, several, folder)]
    if any(again):
        return f"could NOT be continued: {(work / 'log0').read_text().strip()[-200:]}"
    if files.result(what, folder) != wanted:
        return "ANOTHER result"
    return "same result, files LEFT BEHIND" if leftovers(folder) else "continued to the same result"


def fit_member(files: Files, folder: Path, rank: int) -> int:
    plan: Any = {"max_steps": 12, "schedule": "short", "checkpoint_every": 2, "show_progress": False}
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    explainer = TTAME(network(files), recipe="paper", psi="own")
    places: Any = {"checkpoint_dir": folder / "c", "resume_from": folder / "c"}
    (folder / "c").mkdir(exist_ok=True)
    loader = list(images[rank::2].split(2))
    return quiet_end(
        lambda: explainer.fit(loader, **places, **plan),
        lambda: explainer.save(folder / "x.safetensors") if rank == 0 else None,
    )


def evaluate_member(files: Files, folder: Path, rank: int) -> int:
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = network(files)
    methods: Any = {"a": GradCAM(model), "b": RISE(model, n_masks=20)}
    found: list[Any] = []

    def work() -> None:
        found.append(evaluate(model, methods, images.split(2), "ad", path=folder / "r.jsonl", show_progress=False))

    return quiet_end(work, lambda: (folder / "table.csv").write_text(found[0].to_csv()) if rank == 0 else None)


def explain_member(files: Files, folder: Path, rank: int) -> int:
    return command(files.words("explain", folder))


def quiet_end(work: Callable[[], Any], after: Callable[[], Any]) -> int:
    """Do it, then what comes after it; an error of the library and a signal end with a sentence, and no traceback."""
    warnings.simplefilter("ignore")
    try:
        work()
        after()
    except AttribZooError as error:
        print(error)
        return 3
    except KeyboardInterrupt:
        return 4
    return 0


MEMBERS = {"fit": fit_member, "evaluate": evaluate_member, "explain": explain_member}


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


def bits(files: Files, work: Path, times: int) -> list[Row]:
    """Flip one bit, cut, or edit; the file must be refused with a sentence or give the same maps."""
    explainer, checkpoint = prepared(files, work)
    rows, draw = [], random.Random(3)
    for path, use, name in ((explainer, loads(files), "explainer"), (checkpoint, resumes(files), "checkpoint")):
        data = path.read_bytes()
        damaged = path.with_name("damaged.safetensors")
        header = 8 + int.from_bytes(data[:8], "little")
        count = 25 * times
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
        usual = [*files.usual, "--classes", str(folder / "names.json")]
        explain = ["explain", str(files.photos), "--target", "0", "--method", "gradcam,layercam"]
        rate = ["evaluate", "--data", str(files.photos), "--method", "gradcam", "--metrics", "ad", "--max-images", "2"]
        found = [
            printed([*words, "--output", str(folder / words[0]), *usual])
            for words in (explain, [*explain, "--table", "jsonl"], rate)
        ]
        pages = "".join(path.read_text("utf-8") for path in folder.rglob("*.html"))
        found += ["NOT SAFE: markup in the page"] if "<script>alert" in pages or not pages else []
        rows.append(row(f"class name: {name}", Counter([next((f for f in found if f != PRINTED), PRINTED)])))
    rows.append(row("table: names of methods and measures", Counter([table_names()])))
    for name, text in CONFIGS.items():
        folder = fresh(work / "configs")
        (folder / "c.yaml").write_text(text)
        begun = time.monotonic()
        code, said = quietly(["explain", str(files.photos), "--config", str(folder / "c.yaml")])
        took = time.monotonic() - begun
        rows.append(row(f"--config: {name} ({took:.1f} s)", Counter([verdict(code, said)])))
    begun = time.process_time()
    own_stems([Path(str(i), "a.png") for i in range(200_000)])
    rows.append(row("file names: 200 000 photographs of one name", Counter([f"{time.process_time() - begun:.1f} s"])))
    folder = fresh(work / "many")
    for i in range(200_000):
        (folder / f"{i}.png").touch()
    begun = time.process_time()
    find_photos([folder])
    rows.append(row("file names: 200 000 in one folder", Counter([f"{time.process_time() - begun:.1f} s"])))
    shutil.rmtree(folder)
    return rows


PRINTED = "printed and drawn as text"


def printed(words: list[str]) -> str:
    """Whether a command ends well and prints nothing that a terminal would obey."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = command(words)
    text = out.getvalue()
    safe = all(c.isprintable() or c in "\n…" for c in text) and max(map(len, text.splitlines())) < 1000
    return PRINTED if code == 0 and safe else f"NOT SAFE ({words[0]}, {code}): {shown(text[-100:], 100)}"


def table_names() -> str:
    """Draw and write a table whose methods and measure have the hostile names."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    ways: Any = {name: lambda inputs, target: inputs[:, :1] for name in CLASS_NAMES.values()}
    measures: Any = {"$\\frac{": lambda model, inputs, maps, target: maps.mean((1, 2, 3))}
    table = evaluate(model, ways, [torch.randn(2, 3, 4, 4)], measures, controls=False, show_progress=False)
    table.plot().canvas.draw()  # type: ignore[attr-defined]
    lines = [line for line in table.to_markdown().encode().decode().splitlines() if line.startswith("|")]
    cells = list(csv.reader(io.StringIO(table.to_csv())))
    formulas = [cell for line in cells for cell in line if cell.startswith(("=", "+", "@"))]
    return PRINTED if len(lines) == len(ways) + 2 and not formulas else f"NOT SAFE: {len(lines)} lines, {formulas}"


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


def many_threads(files: Files, work: Path, times: int) -> list[Row]:
    """Explain one model from 1 to 16 threads at once; predict with it and train it meanwhile."""
    found: dict[str, Counter[str]] = {}
    for name, counts in wrong_maps(times).items():
        mode, method, _ = name.split(", ", 2)
        what = f"threads, {method}, model in {mode} mode: maps of 1, 2, 4, 8 and 16 at once"
        rest = found.setdefault(what, Counter())
        bad = counts["raised"] + counts["wrong"]
        rest["bitwise those of serial calls"] += times - bad
        rest["NOT those of serial calls"] += bad
        rest["model CHANGED"] += counts["buffers moved"] + counts["modes changed"]
    rows = [row(name, +counts) for name, counts in found.items()]
    for mode, counts in others(times).items():
        bad = counts["raised"] + counts["wrong"] + (mode == "training" and 30 - counts["batches counted, of 30"])
        said = Counter({"as without it": 30 - bad, "NOT as without it": bad})
        rows.append(row(f"threads: passes of a model in {mode} mode while RISE explains it", +said))
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
    """Bytes of memory that a call holds at its peak beyond what was there, and its seconds of CPU time."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    begun = time.process_time()
    kept = call()
    took = time.process_time() - begun
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


def measure_maps(classes: int, work: Path, path: Path, count: int = 1) -> int:
    warnings.simplefilter("ignore")
    images = torch.randn(count, 3, 448, 448)
    explainer = TTAME(Wide(classes), ["stem"], recipe="paper").fit([images[:1]], max_steps=1, show_progress=False)
    size = 4.0 * count * classes * 28 * 28
    with torch.no_grad():
        own, _ = apart(lambda: once_before(explainer.model, images), work)
    peak, took = apart(lambda: once_before(explainer.maps, images), work)
    said = f"{took:.2f} s, {size / 1e6:.0f} MB of maps, {peak / 1e6:.0f} MB at the peak ({peak / size:.2f} x)"
    return told(path, f"{said}; the model's pass alone takes {own / 1e6:.0f} MB")


def once_before(call: Callable[[torch.Tensor], Any], images: torch.Tensor) -> tuple[float, float]:
    """What a call takes after one on a small part of the images, with which a new process takes in the code."""
    call(images[:1, :, :64, :64])
    return peak_of(lambda: call(images))


def measure_many_maps(classes: int, work: Path, path: Path) -> int:
    return measure_maps(classes, work, path, count=20)


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


def measure_saving(classes: int, work: Path, path: Path) -> int:
    """What a checkpoint costs a fit: 8 steps without any, and with one after each step.

    Both in processes that begin with the same memory; what an earlier fit left to the allocator would be taken for
    memory that this one does not need.
    """
    warnings.simplefilter("ignore")
    loader, folder = [torch.randn(8, 3, 64, 64) for _ in range(4)], fresh(work / "saving")
    begin: Any = {"show_progress": False, "schedule": "short", "max_steps": 8, "checkpoint_every": 1}
    said = []
    for recipe in ("rows", "paper"):
        explainer = TTAME(Wide(classes), ["stem"], recipe=recipe).fit(loader, **{**begin, "max_steps": 1})
        ways: list[Any] = [{}, {"checkpoint_dir": folder}]
        without, within = (
            apart(lambda more=more: peak_of(lambda: explainer.fit(loader, **begin, **more)), work) for more in ways
        )
        size = (folder / "checkpoint.safetensors").stat().st_size
        took, more = (within[1] - without[1]) / 8, max(0.0, within[0] - without[0])
        said.append(f"recipe {recipe}: {size / 1e6:.0f} MB, {took:.2f} s each, {more / size:.2f} x of memory more")
    shutil.rmtree(folder)
    return told(path, "; ".join(said))


def apart(measure: Callable[[], tuple[float, float]], work: Path) -> tuple[float, float]:
    """A measurement in a child, which leaves this process as it was."""
    path = work / "apart.json"
    code = ended(forked(lambda: path.write_text(json.dumps(measure())) and 0, work / "log.apart"))
    if code:
        raise SystemExit((work / "log.apart").read_text())
    found: list[float] = json.loads(path.read_text())
    return found[0], found[1]


def told(path: Path, said: str) -> int:
    path.write_text(json.dumps({"said": said}))
    return 0


SCALE = {
    "maps of all classes, 1 image": measure_maps,
    "maps of all classes, 20 images": measure_many_maps,
    "a fit": measure_steps,
    "a checkpoint after each step of a fit": measure_saving,
    "a file of three times K rows": measure_checkpoint,
}


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
    **{
        f"a file name {what}": lambda folder, name=name: shutil.copy(folder / "p0.png", folder / f"{name}.png")
        for what, name in {
            "with an escape sequence": "\x1b[2J",
            "with a line break": "one\ntwo",
            "of mathematics": "$\\frac{",
            "of markup": "<script>alert(1)<",
            "that begins as a formula": "=1+1",
            "that begins as an option": "--output",
            "of 251 letters": "x" * 247,
        }.items()
    },
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

Two processes are started with the variables that `torchrun` sets. SIGKILL goes to one of them, and if the other one has
not ended by itself ten seconds later it gets SIGTERM, as it would from `torchrun`; SIGTERM and SIGHUP go to both. The
fits and evaluations of two processes are calls from Python, all else is commands. "The same result" is the same bits of
an explainer and its facts, the same `table.csv`, the same pixels, maps and lines of the table. Of hostile photographs,
"it ran" means that the good ones were explained and the command ended well.

Steps, maps, checkpoints and file names are timed in seconds of CPU time, on one thread; the model has one convolution
and 512 channels. Memory is what is held at the peak beyond what was held before, in a process that nothing else has
used. Factors of small files say little, since a few megabytes are taken whatever the size.

| what was done | times | what happened |
|---|---|---|
"""


FOOT = """
## What this found

Earlier turns found faults, which were mended; the table is of the library since then.

* A job of `explain` in two processes that lost one of them to SIGKILL was continued to another result, twice in two
  turns: what was left was shared out in batches of other photographs, and one picture differed in two values by 1 of
  255. A photograph now always has the same batch.
* A table's CSV left a carriage return in a name unquoted, which no reader took.
* The class name "mathematics" counted as not safe once, in an early version of this script, which kept no words of it.
  Since then 23 commands with it printed and drew it as text; one that was told to stop by SIGTERM counted as not safe,
  which is how that count may have come about.
* A file was read in twice its size of memory, the mapped file and a copy; now in its size.
* The maps of all classes took up to five times their size if they were smaller than 64 MB, since they were computed at
  once; now those above 4 MB are computed in parts, and what the classes share only once.
* A checkpoint seemed to take 1.87 times its size of memory with the recipe `"rows"`. That was the measurement: the fit
  without checkpoints, which came first, had left memory to the allocator. In two processes that begin with the same
  memory it takes less than a third of its size.

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
from before is continued as it was begun.

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
    "kills": kills,
    "locks": locks,
    "bits": bits,
    "edits": edits,
    "results": results,
    "photographs": photographs,
    "names": names,
    "threads": many_threads,
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
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, here and in the children
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "faults.json"
    found: dict[str, list[Row]] = json.loads(kept.read_text()) if kept.exists() else {}
    files = Files(options.work)
    for name in options.parts or ([] if options.page else PARTS):
        if name not in found:
            found[name] = PARTS[name](files, options.work, options.times)
            kept.write_text(json.dumps(found, indent=1) + "\n")
    if options.page:
        if "kills" not in found and (options.work / "kills.json").exists():
            found["kills"] = kill_rows(Kept(options.work / "kills.json"))
        options.page.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
