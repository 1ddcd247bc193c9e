"""Many threads, one model: the maps of serial calls bit by bit, and nothing that another thread could notice."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from captum.attr import Attribution
from torch import Tensor, nn

import attrib_zoo
from attrib_zoo import RISE, TTAME, AblationCAM, FullGrad, GradCAM, LayerCAM, ScoreCAM
from attrib_zoo.backbone.capture import evaluating, frozen
from attrib_zoo.errors import ModelChangedError
from attrib_zoo.testing.benches import bench
from attrib_zoo.testing.state import Snapshot

METHODS = {
    name: thing
    for name, thing in sorted(vars(attrib_zoo).items())
    if inspect.isclass(thing) and issubclass(thing, Attribution) and not inspect.isabstract(thing)
}
STRESSED: dict[str, Callable[[nn.Module], Any]] = {
    "GradCAM": GradCAM,
    "LayerCAM": LayerCAM,
    "ScoreCAM": ScoreCAM,
    "AblationCAM": AblationCAM,
    "RISE": lambda model: RISE(model, n_masks=8),
}


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    """Threads take turns far more often than they do by default, so that what can go wrong does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def ready(method: Any, model: nn.Module, batches: list[Tensor]) -> Any:
    """An explainer with cheap options, fitted where it must be."""
    explainer = method(model, **getattr(method, "cheap_options", {}))
    if getattr(method, "needs_fit", False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explainer.fit(batches, max_steps=1, show_progress=False)
    return explainer


def at_once(threads: int, call: Callable[[int], Any], calls: int) -> list[Any]:
    """``[call(0), call(1), ...]`` from a pool whose threads begin together."""
    begin = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=begin.wait) as pool:
        return list(pool.map(call, range(calls)))


def check(explainer: Any, model: nn.Module, images: Tensor, threads: int, calls: int) -> None:
    """Maps of calls at once are those of serial calls on a copy of the model in eval mode, and the model as before."""
    serial = copy.deepcopy(explainer)
    serial.model.eval()
    wanted = [serial.attribute(images[i : i + 1], target=i % 3) for i in range(len(images))]
    before = Snapshot(model, images=images)

    def call(number: int) -> Tensor:
        i = number % len(images)
        return explainer.attribute(images[i : i + 1], target=i % 3)

    found = at_once(threads, call, calls)
    wrong = [number for number, map_ in enumerate(found) if not torch.equal(map_, wanted[number % len(images)])]
    assert wrong == []
    assert before.changes() == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, training: bool):
    found = bench("cnn" if "cnn" in METHODS[method].models else "vit")
    model = found.model.train(training)
    check(ready(METHODS[method], model, found.batches), model, found.inputs, threads=3, calls=6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("method", STRESSED)
def test_stress(method: str, training: bool):
    """8 threads x 200 calls."""
    found = bench("cnn")
    model = found.model.train(training)
    check(STRESSED[method](model), model, found.inputs, threads=8, calls=1600)


@pytest.mark.parametrize("name", ["nhwc", "vit", "registers"])
def test_other_layouts(name: str):
    found = bench(name)
    check(GradCAM(found.model.train()), found.model, found.inputs, threads=4, calls=12)


def test_an_explainer_for_each_thread():
    """Explainers share no state but the model, and find their layers at the same time."""
    found = bench("cnn")
    wanted = GradCAM(copy.deepcopy(found.model)).attribute(found.inputs, target=1)
    before = Snapshot(found.model)
    maps = at_once(4, lambda _: GradCAM(found.model).attribute(found.inputs, target=1), 12)
    assert all(torch.equal(map_, wanted) for map_ in maps)
    assert before.changes() == []


# ---------------------------------------------------------------------- what other threads notice


class Explaining:
    """Threads that explain for as long as the block lasts; what they raised is raised at its end."""

    def __init__(self, *calls: Callable[[], Any]) -> None:
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._begun = threading.Barrier(len(calls) + 1)
        self._threads = [threading.Thread(target=self._repeat, args=(call,)) for call in calls]
        self.done = 0

    def _repeat(self, call: Callable[[], Any]) -> None:
        try:
            self._begun.wait()
            while not self._stop.is_set():
                call()
                self.done += 1
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> Explaining:
        for thread in self._threads:
            thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_predictions_of_another_thread(training: bool):
    found = bench("cnn")
    model, images = found.model.train(training), found.inputs
    model.dropout.p = 0.0  # so that a copy gives the same in training mode
    twin = copy.deepcopy(model)
    calls = [lambda: GradCAM(model).attribute(images, target=1), lambda: RISE(model, n_masks=4).attribute(images)]
    with Explaining(*calls) as others, torch.no_grad():
        for _ in range(40):
            assert torch.equal(model(images), twin(images))
    assert others.done
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_training_in_another_thread():
    """The same weights, batch by batch, as training without anybody who explains; every batch is counted."""
    found = bench("cnn")
    model, images = found.model.train(), torch.cat(found.batches)
    alone = copy.deepcopy(model)

    def train(net: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        net.dropout.p = 0.0
        for _ in range(30):
            rows = torch.randperm(len(images), generator=generator)[:4]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), rows % 5).backward()
            optimizer.step()

    explainers = [GradCAM(model), ScoreCAM(model), FullGrad(model)]
    with warnings.catch_warnings(), Explaining(*(_call(explainer, found.inputs) for explainer in explainers)):
        warnings.simplefilter("ignore")
        train(model)
    train(alone)
    assert all(module.training for module in model.modules())
    for (name, value), other in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert int(value) == int(other), name
        assert torch.equal(value, other), name


def _call(explainer: Any, images: Tensor) -> Callable[[], Any]:
    return lambda: explainer.attribute(images, target=1)


def test_weights_that_change_under_a_gradient():
    """The map is then that of the weights as they are afterwards, and not a mixture or torch's own error."""
    found = bench("cnn")
    model, images = found.model, found.inputs
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.weight.mul_(-1)
    explainer = GradCAM(model)
    explainer.attribute(images, target=1)  # the layers are known
    left = [1]

    def step(*_: Any) -> None:  # as another thread's optimiser, between the forward and the backward pass
        if left and left.pop():
            with torch.no_grad():
                model.head.weight.mul_(-1)

    model.register_forward_hook(step)
    assert torch.equal(explainer.attribute(images, target=1), GradCAM(changed).attribute(images, target=1))


def test_weights_that_never_rest():
    found = bench("cnn")
    model = found.model

    def step(module: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            module.head.weight.mul_(-1)

    model.register_forward_hook(step)
    with pytest.raises(ModelChangedError, match=r"copy\.deepcopy"):
        GradCAM(model).attribute(found.inputs, target=1)


def test_gradients_of_another_thread_during_a_fit():
    """The weights are frozen for the fit only, not for who trains the model meanwhile."""
    found = bench("cnn")
    model = found.model.train()
    seen: list[bool] = []

    def batches() -> Iterator[Tensor]:
        for batch in found.batches:
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(lambda: model(found.inputs).requires_grad).result())
                seen.append(all(pool.submit(lambda: [p.requires_grad for p in model.parameters()]).result()))
            yield batch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TTAME(model).fit(list(batches()), max_steps=1, show_progress=False)
        TTAME(model).fit(_Loader(batches), max_steps=2, show_progress=False)
    assert seen
    assert all(seen)


class _Loader:
    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self._make()


def test_random_numbers_of_another_thread():
    """A first call looks at the model and puts nothing back that others have drawn."""
    found = bench("cnn")
    torch.manual_seed(7)
    wanted = [torch.rand(()) for _ in range(2)]
    torch.manual_seed(7)
    drawn: list[Tensor] = []

    def draw(*_: Any) -> None:
        if len(drawn) < 2:
            with ThreadPoolExecutor(1) as pool:
                drawn.append(pool.submit(torch.rand, ()).result())

    found.model.register_forward_hook(draw)
    GradCAM(found.model).attribute(found.inputs, target=1)
    assert drawn == wanted


def test_a_model_that_draws_in_eval_mode_leaves_the_generator_alone_when_it_is_looked_at():
    from attrib_zoo.backbone.layers import look

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.rand(())

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Noisy(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    before = torch.get_rng_state()
    look(model, torch.rand(1, 3, 16, 16, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- the model itself, in place


def test_in_eval_mode_until_the_last_thread_leaves():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_model_without_a_mirror_is_explained_by_one_thread_at_a_time():
    found = bench("cnn")
    model, images = found.model.train(), found.inputs
    wanted = GradCAM(copy.deepcopy(model)).attribute(images, target=1)
    with torch.no_grad():
        predicted = copy.deepcopy(model).eval()(images)
    model.owner = _Owner(model)
    before = Snapshot(model)
    with frozen(model) as running:
        assert running is model
        waiting = threading.Thread(target=model, args=(images,))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        with torch.no_grad():
            assert torch.equal(model(images), predicted)
        handed_over = [module.training for module in model.modules()]
    waiting.join(30)
    assert not waiting.is_alive()
    assert not any(handed_over)
    model.load_state_dict(found.model.state_dict())
    maps = at_once(4, lambda _: GradCAM(model).attribute(images, target=1), 8)
    assert all(module.training for module in model.modules())
    assert all(map_.isfinite().all() for map_ in maps)
    assert [change for change in before.changes() if "hooks" in change or "training" in change] == []
    assert wanted.shape == maps[0].shape


class _Owner:
    """Some object that the mirror cannot look behind, as a trainer is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_compiled_functions_run_eagerly_until_the_last_thread_leaves():
    runs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        runs.append("compiled")
        return graph

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    first, second = frozen(one), frozen(two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    compiled(torch.zeros(1))
    assert runs == []
    second.__exit__(None, None, None)
    compiled(torch.zeros(1))
    assert runs == ["compiled"]


# ---------------------------------------------------------------------- a service


def test_a_service_with_sixteen_clients():
    """A plain ``def`` route, which FastAPI runs in a pool of threads."""
    fastapi = pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    import asyncio

    found = bench("cnn")
    explainer = GradCAM(found.model.train())
    wanted = [explainer.attribute(found.inputs[i : i + 1], target=i) for i in range(3)]
    app = fastapi.FastAPI()

    @app.get("/explain/{number}")
    def explain(number: int) -> list[float]:
        return explainer.attribute(found.inputs[number : number + 1], target=number)[0, 0].flatten().tolist()

    async def client(service: Any, first: int) -> list[tuple[int, Any]]:
        numbers = [(first + step) % 3 for step in range(5)]
        return [(number, await service.get(f"/explain/{number}")) for number in numbers]

    async def everybody() -> list[tuple[int, Any]]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as service:
            answers = await asyncio.gather(*(client(service, first) for first in range(16)))
        return [answer for some in answers for answer in some]

    answers = asyncio.run(everybody())
    assert len(answers) == 80
    for number, answer in answers:
        assert answer.status_code == 200
        assert answer.json() == wanted[number][0, 0].flatten().tolist()
