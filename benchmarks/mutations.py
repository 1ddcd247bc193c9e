"""Do the tests notice? Plants one small fault at a time in a copy of the package and runs the tests that should see it.

Run from the root of the repository, with the test extra installed::

    python benchmarks/mutations.py                       # all, some minutes
    python benchmarks/mutations.py --only metrics/ sise  # those whose file or test contains one of the words
    python benchmarks/mutations.py --tree OTHER --output before.json

Every mutation names the file, the text that is replaced, what replaces it, and the pytest arguments that must fail.
The test that fails must pass without the fault. Ends with 1 if a mutation survives, with 2 if its text is not in the
file exactly once: the code has changed, write the mutation again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDERS = ("attrib_zoo", "tests", "examples", "docs", "benchmarks")
FILES = ("pyproject.toml", "setup.cfg", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")


@dataclass(frozen=True)
class Mutation:
    """A fault: ``old`` becomes ``new`` in ``attrib_zoo/file``, and pytest with ``tests`` must fail."""

    file: str
    old: str
    new: str
    tests: str


def of_methods(file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"methods/{file}.py", old, new, f"tests/methods/test_{test}.py")


def of_metrics(file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"metrics/{file}.py", old, new, f"tests/metrics/test_{test}.py")


def of_backbone(file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"backbone/{file}.py", old, new, f"tests/{test}.py")


def of_training(file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"training/{file}.py", old, new, f"tests/training/test_{test}")


CONTRACT = "tests/testing/test_contract.py -k "
MUTATIONS = (
    # ------------------------------------------------------------------ methods
    of_methods("eigencam", "vectors[:, :, -1] *", "vectors[:, :, 0] *", "features"),
    of_methods("eigencam", "torch.where(total < 0, -1.0, 1.0)", "torch.where(total < 0, 1.0, 1.0)", "features"),
    of_methods("factorization", "descending=True", "descending=False", "features"),
    of_methods("refinecam", ".prod(0)", ".mean(0)", "refinecam"),
    of_methods("fullgrad", "values[:, prefix:]", "values[:, : values.shape[1] - prefix]", "fullgrad"),
    of_backbone("libra", "share = 1 / len(operands)", "share = 1", "backbone/test_libra"),
    of_backbone(
        "libra",
        "deviation = (middle.detach().square().mean(over",
        "deviation = (middle.square().mean(over",
        "backbone/test_libra",
    ),
    Mutation(
        "backbone/targets.py",
        "return Functions(self.index[rows.to(self.index.device)], scalars=scalars, columns=columns)",
        "return Functions(self.index[rows.to(self.index.device)], scalars=self.scalars, columns=columns)",
        "tests/test_other_outputs.py",
    ),
    of_methods("legrad", "relu().mean(", "abs().mean(", "legrad"),
    of_backbone(
        "vit/layerwise", "activation if position == last else activation.detach()", "activation", "methods/test_legrad"
    ),
    of_methods("gradcam", "gradients.mean(", "gradients.sum(", "gradcam"),
    of_methods("gradcam_plus_plus", "under = 2 + gradients", "under = 1 + gradients", "gradient_cams"),
    of_methods(
        "hirescam", "(gradients * activations).sum(1)", "(gradients.relu() * activations).sum(1)", "gradient_cams"
    ),
    of_methods("layercam", "(gradients.relu() * activations)", "(gradients * activations)", "gradient_cams"),
    of_methods("layercam", "for heat in maps]).amax(0)", "for heat in maps]).mean(0)", "gradient_cams"),
    of_methods("xgradcam", "(activations.abs() if self", "(activations if self", "gradient_cams"),
    of_methods(
        "zoomcam",
        "return min_max(super().layer_map(activation, gradient))",
        "return super().layer_map(activation, gradient)",
        "zoomcam",
    ),
    of_methods("cam", "tolerance = max(1e-4,", "tolerance = max(1e4,", "cam"),
    of_methods("integrated_gradcam", 'numbers + (self.rule == "right")', "numbers", "copies"),
    of_methods("smooth_gradcam_plus_plus", "2 * second + unit * third *", "second + unit * third *", "copies"),
    of_methods("scorecam", "if self.subtract_base:", "if not self.subtract_base:", "scorecam"),
    of_methods("scorecam", "return upsample(min_max(maps), size)", "return min_max(upsample(maps, size))", "scorecam"),
    of_methods(
        "bases/perturbation",
        "return maps.amax((-2, -1)) > maps.amin((-2, -1))",
        "return maps.amax((-2, -1)) >= maps.amin((-2, -1))",
        "scorecam",
    ),
    of_methods("sise", "ratios > self.mu", "ratios > 0", "sise"),
    of_methods("adasise", "(ratios > 0).long()", "torch.ones_like(bins)", "sise"),
    of_methods(
        "bases/blockwise",
        "(self.total + deeper) * self._mask(deeper)",
        "self.total * self._mask(deeper) + deeper",
        "sise",
    ),
    of_methods("bases/blockwise", "return between.argmax(1) + 1", "return between.argmax(1)", "sise"),
    of_methods("sidu", "/ (2 * self.sigma**2)", "/ self.sigma**2", "sidu"),
    of_methods("rise", "/ (self.n_masks * self.p1)", "/ self.n_masks", "rise"),
    of_methods("rise", "* cells / length - 0.5", "* cells / length", "rise"),
    of_methods("polycam", "(shown + base - hidden)", "(shown - hidden)", "polycam"),
    of_methods("ablationcam", '"abs": clean.abs()', '"abs": clean', "ablationcam"),
    of_methods("fullgrad", "term.abs().flatten(2)", "term.flatten(2)", "fullgrad"),
    of_methods("extremal", "(1 - _DAMPENING) * slope", "slope", "extremal"),
    of_methods("extremal", "gone = gain(1 - mask, flip)", "gone = gain(mask, flip)", "extremal"),
    of_methods(
        "iia", "low = again.maps.amin((2, 3), keepdim=True)", "low = again.maps.amin((1, 2, 3), keepdim=True)", "iia"
    ),
    of_methods("iia", "total / side**2", "total / side", "iia"),
    of_methods("rollout", "block.values.mean(-3)", "block.values.amax(-3)", "attention"),
    of_methods(
        "bases/attention", "(gradients * values).relu_().mean(-3)", "(gradients * values).mean(-3).relu_()", "attention"
    ),
    of_methods("transformer_lrp", "first = number == self.start_layer", "first = number == 0", "transformer_lrp"),
    of_methods(
        "bases/relevance", "inputs.clamp(min=0), inputs.clamp(max=0)", "inputs.clamp(min=0), inputs", "transformer_lrp"
    ),
    of_methods("ttame", "(drawn >= classes", "(drawn > classes", "ttame"),
    of_methods(
        "ttame",
        "(area_term + recipe.lambda_variation * variation_term)",
        "recipe.lambda_variation * (area_term + variation_term)",
        "ttame",
    ),
    of_methods("lcam", "return 2 * variation(masks, total=True)", "return variation(masks, total=True)", "lcam"),
    Mutation(
        "methods/rise.py",
        "some = masks(first, int(number[-1]) + 1)",
        "some = masks(first, int(number[-1]) + 1) + 0 * torch.rand(1)",
        CONTRACT + "RISE-nothing_left",
    ),
    Mutation(
        "backbone/targets.py",
        "outputs.argmax(dim=1, keepdim=True)",
        "outputs.argmin(dim=1, keepdim=True)",
        CONTRACT + "GradCAM-own_decision",
    ),
    # ------------------------------------------------------------------ metrics
    of_metrics("confidence", "torch.where(drop > 0, whole,", "torch.where(drop > 0, whole + 1,", "metrics"),
    of_metrics("confidence", "rose = (masked > whole)", "rose = (masked >= whole)", "metrics"),
    of_metrics("insertion_deletion", "dx=1 / (curve.shape[1] - 1)", "dx=1 / curve.shape[1]", "curves"),
    of_metrics("insertion_deletion", "< counts[places]", "<= counts[places]", "curves"),
    of_metrics("localization", "<= reach**2", "< reach**2", "localization"),
    of_metrics("localization", "_count(chosen | inside, maps)", "_count(inside, maps)", "localization"),
    of_metrics("complexity", "dtype=values.dtype) - n - 1", "dtype=values.dtype) - n", "localization"),
    of_metrics("_maps", "math.ceil(keep * values.shape[1] - 1e-9)", "math.floor(keep * values.shape[1])", "metrics"),
    of_metrics(
        "road", 'relevance if order == "morf" else -relevance', 'relevance if order != "morf" else -relevance', "road"
    ),
    of_metrics("_poisson", "side[-1] -= 1", "side[-1] -= 0", "road"),
    of_metrics("similarity", "unbiased = side**2 / max(side**2 - 1, 1)", "unbiased = 1.0", "randomization"),
    of_metrics("similarity", ".remainder(math.pi)", ".abs()", "randomization"),
    of_metrics("sanity", "if torch.equal(maps, before)", "if torch.equal(maps, first)", "randomization"),
    of_metrics(
        "robustness",
        "(2 * torch.rand(shape, generator=maker) - 1) * radius",
        "torch.rand(shape, generator=maker) * radius",
        "robustness",
    ),
    # ------------------------------------------------------------------ backbone
    of_backbone("grid", "device=cells.device).argsort()]", "device=cells.device)]", "backbone/test_grid"),
    of_backbone("grid", "maps.permute(0, 2, 3, 1)", "maps.permute(0, 3, 2, 1)", "backbone/test_grid"),
    Mutation(
        "backbone/capture.py",
        "return value[rows.to(value.device)]",
        "return value[: len(rows)]",
        CONTRACT + "RISE-forward_args",
    ),
    of_backbone(
        "capture",
        '(module, "training", False) for module in modules]',
        '(module, "training", False) for module in modules[:1]]',
        "backbone/test_capture",
    ),
    of_backbone("capture", "grid.to_map(kept).clone()", "grid.to_map(kept)", "backbone/test_capture"),
    of_backbone("replay", "earlier = len(records[recorder.layer]) - 1", "earlier = 0", "backbone/test_replay"),
    of_backbone("replay", "own.update(before)", "pass", "backbone/test_replay"),
    of_backbone(
        "layers/stages", "if end not in stems][-count:]", "if end not in stems][:count]", "backbone/test_layers"
    ),
    of_backbone("layers/known", "all(module() is not None for module in self._modules)", "True", "backbone/test_known"),
    of_backbone(
        "layers/known",
        "if found is None or not found.describes(structure):",
        "if found is None:",
        "backbone/test_known",
    ),
    of_backbone("layers/known", 'name != "training" and name[0] != "_"', 'name == ""', "backbone/test_known"),
    of_backbone("layers/layouts", "pending = sorted(trace.sizes)[::-1]", "pending = []", "backbone/test_layers"),
    of_backbone("layers/layouts", "abs(h * width - w * height) <= max(height, width)", "True", "backbone/test_layers"),
    of_backbone(
        "layers/lookup",
        'output.shape[1 if hint.kind == "tokens" else 2] - hint.prefix',
        'output.shape[1 if hint.kind == "tokens" else 2]',
        "backbone/test_layers",
    ),
    of_backbone("vit/heads", "(q * self.scale @ k", "(q @ k", "methods/test_attention"),
    of_backbone("vit/attention", "values = values * self._factor", "pass", "methods/test_attention"),
    of_backbone(
        "kind",
        "return attention and linear > convolution",
        "return attention",
        "backbone/test_layers.py tests/metrics/test_metrics",
    ),
    of_backbone("layers/trace", "_places(tensor) == where", "True", "backbone/test_gridcheck"),
    of_backbone(
        "layers/gridcheck", "class _Enough(BaseException)", "class _Enough(Exception)", "backbone/test_gridcheck"
    ),
    # ------------------------------------------------------------------ training
    of_training("losses", "(logits.sigmoid() + offset) ** power", "logits.sigmoid() ** power", "losses"),
    of_training("losses", "2 * masks[0].numel()", "masks[0].numel()", "losses"),
    of_training(
        "losses",
        "torch.stack([torch.zeros_like(z), z], dim=1)",
        "torch.stack([z, torch.zeros_like(z)], dim=1)",
        "losses",
    ),
    of_training(
        "schedule",
        "min(self.last_epoch // self.period, self.drops)",
        "(self.last_epoch // self.period)",
        "losses.py tests/methods/test_lcam",
    ),
    of_training(
        "schedule",
        "if schedule.decay_biases else 0.0",
        "if not schedule.decay_biases else 0.0",
        "losses.py tests/methods/test_lcam",
    ),
    of_training("head", "branch = branch + features", "pass", "head"),
    of_training(
        "head",
        "(weight + self.common[:-1]) * self.scale, bias + self.common[-1]",
        "(weight + self.common[:-1]) * self.scale, bias",
        "head",
    ),
    of_training("checkpoint", "in model.state_dict().items()}", "in model.named_parameters()}", "checkpoint"),
    of_training("files", "path.unlink(missing_ok=True)", "pass", "files"),
    of_training("files", "os.fsync(file.fileno())", "pass", "files"),
    of_training("data", "if self.position > skip:", "if self.position >= skip:", "fit"),
    of_training("session", "parameter.requires_grad = True", "pass", "fit.py -k unusual"),
    of_training("fit", "state.network.train(training)", "pass", "fit"),
)


def copy_tree(source: Path, target: Path) -> None:
    """What the tests need, without caches."""
    for name in FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def arguments_of(tests: str) -> list[str]:
    """Pytest's arguments; ``.py`` is added to paths that lack it."""
    return [word if ".py" in word or not word.startswith("tests/") else f"{word}.py" for word in tests.split()]


def run_tests(root: Path, arguments: Sequence[str], log: Path) -> tuple[int, float]:
    """Pytest's exit status and its CPU seconds, in a process of its own that begins with torch already imported."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(root)
            sys.path.insert(0, str(root))
            import pytest

            quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = int(pytest.main(["-x", "-n", "0", *quiet, *arguments]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, result, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(result), usage.ru_utime + usage.ru_stime


def try_out(mutation: Mutation, root: Path, log: Path) -> tuple[str, float, str]:
    """What became of a fault, the CPU seconds, and the test that saw it: one that passes without the fault."""
    file = root / "attrib_zoo" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return "not planted", 0.0, f"its text is {text.count(mutation.old)} times in the file"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, spent = run_tests(root, arguments_of(mutation.tests), log)
    finally:
        file.write_text(text, encoding="utf-8")
    if code != 1:
        return "survived" if code == 0 else f"pytest ended with {code}", spent, ""
    failed = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith(("FAILED ", "ERROR "))]
    test = failed[0].split(" - ")[0].partition(" ")[2]
    if run_tests(root, [test], log)[0] != 0:
        return "fails without it too", spent, test
    return "killed", spent, test


def prepare() -> None:
    """Import what does not change once, and let Hypothesis report the first failing example instead of the smallest."""
    sys.dont_write_bytecode = True  # a mutated file may have the size and second of the one before it
    import captum.attr
    import hypothesis
    import pytest  # noqa: F401
    import timm
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    del captum, timm
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("first failure", phases=phases, database=None)
    hypothesis.settings.load_profile("first failure")


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="repository to mutate")
    parser.add_argument("--only", nargs="*", help="words of the files or tests to keep")
    parser.add_argument("--output", type=Path, help="results as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Plant every fault and print whether it was noticed."""
    asked = read_arguments(words)
    chosen = [m for m in MUTATIONS if not asked.only or any(w in m.file or w in m.tests for w in asked.only)]
    prepare()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder) / "tree", Path(folder) / "log"
        root.mkdir()
        copy_tree(asked.tree, root)
        for mutation in chosen:
            outcome, spent, test = try_out(mutation, root, log)
            results.append({**asdict(mutation), "outcome": outcome, "cpu_seconds": round(spent, 1), "test": test})
            print(
                f"{outcome:12} {spent:6.1f} s  {mutation.file}: {mutation.old!r} -> {mutation.new!r}  {test}",
                flush=True,
            )
            if asked.output:
                asked.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    killed = sum(r["outcome"] == "killed" for r in results)
    print(f"{killed} of {len(results)} mutations killed")
    if any(r["outcome"] == "not planted" for r in results):
        return 2
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
