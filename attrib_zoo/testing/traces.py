"""What a call leaves behind, what it may depend on, and models in unusual states."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attrib_zoo.errors import BackboneMismatchError
from attrib_zoo.testing.benches import MODELS, PlannedError
from attrib_zoo.testing.state import Snapshot
from attrib_zoo.testing.suite import Case, Inapplicable, check, different, expect, raises, same, unchanged

_ALL = tuple(MODELS)
_MOST_FORWARDS = 6


@check(*_ALL)
def nothing_left(case: Case) -> None:
    """No hook, gradient, flag, attribute or random state is left in the model, the images or the process."""
    for parameter in case.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    next(case.model.parameters()).requires_grad_(False)
    images = case.inputs.clone().requires_grad_()
    images.grad = torch.full_like(images, 3.0)
    explainer = case.explainer
    before = Snapshot(case.model, inputs=images, gate=case.bench.gates)
    explainer.attribute(images, target=case.targets, additional_forward_args=case.bench.gates)
    unchanged(before, "after a call")
    with torch.no_grad():
        before = Snapshot(case.model, inputs=images)
        explainer.attribute(images)
        unchanged(before, "after a call under no_grad")


@check(*_ALL)
def nothing_left_on_error(case: Case) -> None:
    """Nothing is left either when the model raises in its first, second, ... forward, or in its backward."""
    explainer, fuse = case.explainer, case.model.fuse
    before = Snapshot(case.model, inputs=case.inputs)
    for number in range(1, _MOST_FORWARDS + 1):
        fuse.forward_in = number
        failed = _fails(lambda: explainer.attribute(case.inputs, target=case.targets))
        fuse.forward_in = 0
        unchanged(before, f"after a failure in forward number {number}")
        if not failed:
            break
    fuse.in_backward = True
    _fails(lambda: explainer.attribute(case.inputs, target=case.targets))
    fuse.in_backward = False
    unchanged(before, "after a failure in backward")
    same(explainer.attribute(case.inputs, target=case.targets), case.maps, "the next call", 0)


def _fails(call: Callable[[], Any]) -> bool:
    try:
        call()
    except PlannedError:
        return True
    return False


@check("cnn", "vit")
def train_mode(case: Case) -> None:
    """A model left in training mode gives the map of eval mode; BatchNorm's statistics and all flags stay."""
    wanted = case.maps
    case.model.train()
    next(m for m in case.model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))).eval()
    before = Snapshot(case.model)
    found = case.explainer.attribute(case.inputs, target=case.targets)
    unchanged(before, "a model in training mode")
    same(found, wanted, "training mode against eval mode", 0)
    found = case.explainer.attribute(case.inputs)
    unchanged(before, "a model in training mode, without a target")
    case.model.eval()
    wanted = case.explainer.attribute(case.inputs)
    same(found, wanted, "training mode against eval mode, without a target", 0)


@check(*_ALL)
def forward_args(case: Case) -> None:
    """Extra forward arguments reach the model, each image with its own; numbers and strings pass through."""
    ask, gates = case.explainer.attribute, case.bench.gates
    gated = ask(case.inputs, target=case.targets, additional_forward_args=gates)
    different(gated, case.maps, "with and without the forward argument")
    same(ask(case.inputs, target=case.targets, additional_forward_args=(gates,)), gated, "a 1-tuple of it", 0)
    for i, target in enumerate(case.targets):
        alone = ask(case.inputs[i : i + 1], target=target, additional_forward_args=gates[i : i + 1])
        same(gated[i : i + 1], alone, f"image {i} with its argument, in the batch against alone", 1e-4)
    mixed = (gates, torch.tensor(2.0, dtype=gates.dtype), "negative")
    wanted = ask(case.inputs, target=case.targets, additional_forward_args=-2 * gates)
    found = ask(case.inputs, target=case.targets, additional_forward_args=mixed)
    same(found, wanted, "a tensor without axes and a string beside it", 1e-4)


@check("cnn", "vit")
def deterministic(case: Case) -> None:
    """The same call gives the same bits, whatever the global generators say."""
    ask = case.explainer.attribute
    same(ask(case.inputs, target=case.targets), case.maps, "a second call", 0)
    torch.manual_seed(123)
    same(ask(case.inputs, target=case.targets), case.maps, "after torch.manual_seed(123)", 0)
    fresh = case.ready(case.model).attribute(case.inputs, target=case.targets)
    same(fresh, case.maps, "a second object", 0)


@check("cnn", "vit")
def frozen_parameters(case: Case) -> None:
    """A model whose parameters require no gradient gives the same map."""
    case.model.requires_grad_(True)
    wanted = case.explainer.attribute(case.inputs, target=case.targets)
    case.model.requires_grad_(False)
    same(case.explainer.attribute(case.inputs, target=case.targets), wanted, "frozen parameters", 1e-5)


@check("cnn", "vit")
def inference_mode(case: Case) -> None:
    """The same map inside ``torch.inference_mode()``, and for tensors that were made there."""
    explainer, wanted = case.explainer, case.maps
    with torch.inference_mode():
        same(explainer.attribute(case.inputs, target=case.targets), wanted, "in inference_mode", 1e-6)
        made = case.inputs.clone()
        same(explainer.attribute(made, target=case.targets), wanted, "an inference tensor", 1e-6)
    same(explainer.attribute(made, target=case.targets), wanted, "an inference tensor outside", 1e-6)


@check(*_ALL)
def float64(case: Case) -> None:
    """The result has the input's dtype; in float64 it is the float32 map with more digits."""
    expect(case.maps.dtype == torch.float32, f"float32 in: got {case.maps.dtype}")
    double = copy.deepcopy(case.explainer)
    double.forward_func.double()
    found = double.attribute(case.inputs.double(), target=case.targets)
    expect(found.dtype == torch.float64, f"float64 in: got {found.dtype}")
    same(found.float(), case.maps, "float64 against float32", 1e-3)
    fresh = case.at(dtype=torch.float64)
    expect(fresh.maps.dtype == torch.float64, f"float64 in, fitted there: got {fresh.maps.dtype}")
    step = 1e-9 * torch.randn_like(fresh.inputs)
    once, twice = (
        fresh.explainer.attribute(fresh.inputs + n * step, target=fresh.targets) - fresh.maps for n in (1, 2)
    )
    crooked = float((twice - 2 * once).norm() / twice.norm().clamp_min(1e-30))
    expect(crooked < 0.1, "float64: a change of 1e-9 in the images gets lost, so the values pass through float32")


@check("cnn", "vit")
def half_precision(case: Case) -> None:
    """Models in bfloat16 and float16 give finite maps close to those of float32."""
    for dtype in (torch.bfloat16, torch.float16):
        half = case.at(dtype=dtype)
        try:
            half.model(half.inputs)
        except RuntimeError:  # an operation that this machine lacks in this dtype
            continue
        found = half.maps
        expect(found.dtype == dtype, f"{dtype} in: got {found.dtype}")
        expect(bool(torch.isfinite(found).all()), f"{dtype}: expected finite maps")
        likeness = _cosine(found.double(), case.maps.double())
        expect(likeness > 0.95, f"{dtype}: expected maps close to float32, cosine is {likeness:.3f}")


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))


@check("cnn", "vit")
def gpu(case: Case) -> None:
    """On a GPU the result stays there and agrees with the CPU's."""
    if not torch.cuda.is_available():
        raise Inapplicable("no CUDA device")
    moved = copy.deepcopy(case.explainer)
    moved.forward_func.cuda()
    found = moved.attribute(case.inputs.cuda(), target=case.targets)
    expect(found.device.type == "cuda", f"expected the result on the GPU, got {found.device}")
    same(found.cpu(), case.maps, "GPU against CPU", 2e-2)


@check("cnn", "vit")
def copies(case: Case) -> None:
    """``copy.deepcopy`` and pickle keep the result, and a copy explains its own model."""
    explainer, wanted = case.explainer, case.maps
    made = {"copy.deepcopy": copy.deepcopy(explainer)}
    if "<locals>" not in type(explainer).__qualname__:
        made["pickle"] = pickle.loads(pickle.dumps(explainer))
    for how, twin in made.items():
        same(twin.attribute(case.inputs, target=case.targets), wanted, f"after {how}", 0)
        expect(twin.forward_func is not explainer.forward_func, f"{how}: expected a model of its own")
        with torch.no_grad():
            for parameter in twin.forward_func.parameters():
                parameter.mul_(-1)
        same(
            explainer.attribute(case.inputs, target=case.targets),
            wanted,
            f"{how}: the original after a change of the copy",
            0,
        )
        try:
            found = twin.attribute(case.inputs, target=case.targets)
        except BackboneMismatchError:  # fitted for other weights, and says so
            continue
        different(found, wanted, f"{how}: the copy after its model's weights changed sign")


@check(*_ALL)
def memory_layouts(case: Case) -> None:
    """Images that are not contiguous (channels last, a slice, an expanded batch, turned) get the maps of their copies.

    ``x.view`` fails on them, and code that reads raw memory sees other images.
    """
    ask, images, targets = case.explainer.attribute, case.inputs, case.targets
    n, c, h, w = images.shape
    wide = images.new_zeros(n, c + 2, 2 * h, w + 7)
    wide[:, 1:-1, ::2, 3:-4] = images
    for what, other in (
        ("channels last", images.contiguous(memory_format=torch.channels_last)),
        ("a slice of larger images", wide[:, 1:-1, ::2, 3:-4]),
        ("images turned in memory", images.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        expect(not other.is_contiguous() and torch.equal(other, images), "fault of the suite: these are contiguous")
        found = ask(other, target=targets)
        expect(found.is_contiguous(), f"{what}: expected a contiguous map")
        same(found, case.maps, what, 1e-4)
    first = images[:1].expand(2, -1, -1, -1)
    same(ask(first, target=[2, 1]), ask(first.contiguous(), target=[2, 1]), "an expanded image", 1e-4)


@check()
def keeps_no_tensor(case: Case) -> None:
    """Calls keep no tensor alive except possibly some of the first call, and no graph, which would hold activations."""
    explainer = case.explainer
    gc.collect()
    held = gc.get_freeze_count()
    gc.freeze()  # so that only new objects are examined
    try:
        explainer.attribute(case.inputs, target=case.targets)
        gc.collect()
        graphs = sum(_has_graph(thing) for thing in gc.get_objects())
        counts = []
        for _ in range(2):
            for step in range(3):
                explainer.attribute(case.inputs, target=[step, 1, 2])
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    finally:
        if not held:  # what the caller has frozen stays so
            gc.unfreeze()
    expect(not graphs, f"a call left {graphs} tensor(s) alive that hold its graph, and so its activations")
    expect(counts[1] <= counts[0], f"three more calls left {counts[1] - counts[0]} more tensors alive")


def _has_graph(thing: Any) -> bool:
    return issubclass(type(thing), Tensor) and thing.grad_fn is not None


@check("cnn", "vit")
def compiled_models(case: Case) -> None:
    """A ``torch.compile``d model that has run before is explained like the model that it was made from."""
    try:
        compiled = torch.compile(case.model, backend="eager")
        compiled(case.inputs)
    except RuntimeError as error:
        raise Inapplicable(f"no torch.compile here: {error}") from None
    found = case.ready(compiled).attribute(case.inputs, target=case.targets)  # type: ignore[arg-type]
    same(found, case.maps, "compiled against eager", 1e-5)


@check()
def scripted_models(case: Case) -> None:
    """Scripted and traced models, which run no hooks, are explained correctly or refused in a clear sentence."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
    plain.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)])
    scripted = torch.jit.script(plain.eval())
    traced = torch.jit.trace(case.model, case.inputs)
    for what, model in (("a scripted model", scripted), ("a traced model", traced)):
        try:
            found = case.ready(model).attribute(case.inputs, target=case.targets)
        except Exception as error:
            again = error
        else:
            expect(bool(torch.isfinite(found).all()) and bool(found.any()), f"{what}: expected a map or an error")
            continue
        raises(lambda e=again: _throw(e), "script|traced|torch.jit", what=what)  # type: ignore[misc]


def _throw(error: Exception) -> None:
    raise error


@check("cnn", "vit")
def data_parallel(case: Case) -> None:
    """Models in DataParallel and DistributedDataParallel are explained like the bare model."""
    found = case.ready(nn.DataParallel(case.model)).attribute(case.inputs, target=case.targets)
    same(found, case.maps, "in DataParallel", 1e-5)
    distributed: Any = torch.distributed
    if not distributed.is_available() or distributed.is_initialized() or not distributed.is_gloo_available():
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(case.model)
        found = case.ready(model).attribute(case.inputs, target=case.targets)
    finally:
        distributed.destroy_process_group()
    same(found, case.maps, "in DistributedDataParallel", 1e-5)
