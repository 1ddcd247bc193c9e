"""Replay against full forward passes of a copy without in-place modules, in which a plain hook replaces the layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import engine_cases as cases
import pytest
import torch
from engine_cases import Guard, full_forward, tap, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attrib_zoo.backbone.capture import frozen, run
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.backbone.replay import Replay, replay
from attrib_zoo.errors import InputError, LayerError

ATOL = 1e-9
CHUNKS = ([0], [1, 1, 1], [1, 0, 1, 1], [0])  # one row, several of one image, two images in one chunk


def disturbed(maps: Tensor, seed: int = 0) -> Tensor:
    """Maps of the same shape and size of values, each different, the first channel zero."""
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    changed = maps + (noise * maps.double().std()).to(maps.dtype)
    changed[:, 0] = 0
    return changed


def compare(
    again: Replay, model: nn.Module, inputs: Tensor, at: Tap, twin: nn.Module, args: tuple[Any, ...] = ()
) -> None:
    """Every chunk against full forward passes; the replacement matters, and no replay changes the next."""
    torch.testing.assert_close((again.outputs, [again.maps]), run(model, inputs, args, [at]), rtol=0, atol=ATOL)
    for rows in [rows for rows in CHUNKS if max(rows) < len(inputs)]:
        index = torch.tensor(rows)
        maps = disturbed(again.maps[index])
        picked = tuple(a[index] if isinstance(a, Tensor) and len(a) == len(inputs) else a for a in args)
        with torch.no_grad():
            expected = full_forward(twin, inputs[index], at, maps, picked)
        torch.testing.assert_close(again(maps, index), expected, rtol=0, atol=ATOL)
        assert (again.outputs[index] - expected).abs().max() > 1e6 * ATOL, "the replacement must matter"


def check(model: nn.Module, inputs: Tensor, at: Tap, *, shortcut: bool = True, args: tuple[Any, ...] = ()) -> None:
    with untouched(model, inputs), frozen(model), replay(model, inputs, args, at) as again:
        compare(again, model, inputs, at, cases.out_of_place(model), args)
        assert again.shortcut is shortcut


class TestEveryLayer:
    """All layers and all calls that put out an image or tokens."""

    @staticmethod
    def taps(model: nn.Module, inputs: Tensor, *, nhwc: bool = False) -> list[Tap]:
        return [
            tap(name, cases.grid_of(shape, nhwc=nhwc), calls=len(shapes), call=call)
            for name, shapes in cases.survey(model, inputs).items()
            for call, shape in enumerate(shapes)
            if shape is not None and len(shape) in (3, 4)
        ]

    @pytest.mark.parametrize(
        ("build", "least"),
        [(cases.resnet, 50), (cases.bottleneck, 60), (cases.vit, 45), (cases.fused_vit, 15), (cases.densenet, 35)],
    )
    def test_agrees_with_full_forwards(self, build: Callable[[], nn.Module], least: int):
        model, inputs = build().double(), cases.images(2, dtype=torch.float64)
        guard, twin = Guard(model, inputs), cases.out_of_place(model)
        taps = self.taps(model, inputs)
        assert len(taps) >= least
        for at in taps:
            with frozen(model), replay(model, inputs, (), at) as again:
                compare(again, model, inputs, at, twin)
                assert again.shortcut, at.name
        guard.check()

    def test_swin_refuses_what_works_on_windows(self):
        model, inputs = cases.swin().double(), cases.images(2, 16, dtype=torch.float64)
        guard, twin = Guard(model, inputs), cases.out_of_place(model)
        parts = ("", ".qkv", ".softmax", ".attn_drop", ".proj", ".proj_drop")
        windows = {f"layers.0.blocks.{block}.attn{part}" for block in (0, 1) for part in parts}
        for at in self.taps(model, inputs, nhwc=True):  # the last stage is a single window
            with frozen(model):
                if at.name in windows:
                    message = (
                        f"'{at.name}' must put out one row for each of the 2 images, got shape .8, .*block around it"
                    )
                    with pytest.raises(LayerError, match=message), replay(model, inputs, (), at):
                        pass
                    continue
                with replay(model, inputs, (), at) as again:
                    compare(again, model, inputs, at, twin)
                    assert again.shortcut, at.name
        guard.check()

    @pytest.mark.parametrize("name", ["layer4.0.downsample", "layer4.1.bn2", "layer4.1", "conv1"])
    def test_one_image(self, name: str):
        model = cases.resnet().double()
        check(model, cases.images(1, dtype=torch.float64), tap(name))


class Inplace(nn.Module):
    """Functional in-place operations on what modules have put out, around the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip = self.side(x)
        x.mul_(2)
        y = self.layer(x).mul_(0.5)
        skip += y
        x.add_(skip.relu_())
        return self.head(x.mean((2, 3)))


class Toy(nn.Module):
    """A stem, a layer and a head; subclasses say what happens between them."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, cases.CLASSES)
        for name, module in more.items():
            self.add_module(name, module)

    def between(self, x: Tensor) -> Tensor:
        return self.layer(x) + x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)).tanh().mean((2, 3)))


def toy(between: Callable[[Any, Tensor], Tensor] | None = None, **more: nn.Module) -> nn.Module:
    kind = Toy if between is None else type("Model", (Toy,), {"between": between})
    return cases.lively(kind(**more)).double()


def doubles(count: int = 2, size: int = 32) -> Tensor:
    return cases.images(count, size, dtype=torch.float64)


class TestInPlace:
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("name", ["stem", "side", "layer"])
    def test_functional_with_a_skip(self, name: str, count: int):
        def between(self: Any, x: Tensor) -> Tensor:
            skip = self.side(x)
            x.mul_(2)
            skip += self.layer(x).mul_(0.5)
            return x.add_(skip.relu_())

        check(toy(between, side=nn.Conv2d(4, 4, 1)), doubles(count), tap(name))

    @pytest.mark.parametrize("count", [1, 2])
    def test_on_the_input(self, count: int):
        class Standardise(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Toy()

            def forward(self, x: Tensor) -> Tensor:
                x.sub_(0.3).div_(1.7)
                return self.net(x) + x.mean((2, 3))[:, :1]

        model, inputs = cases.lively(Standardise()).double(), doubles(count)

        def compare_all(again: Replay) -> None:
            for rows in [torch.zeros(1).long(), torch.zeros(3).long(), torch.arange(count)]:
                maps = disturbed(again.maps[rows])
                with torch.no_grad():
                    expected = full_forward(model, inputs[rows], tap("net.layer"), maps)
                torch.testing.assert_close(again(maps, rows), expected, rtol=0, atol=ATOL)

        with untouched(model, inputs), frozen(model):
            with replay(model, inputs, (), tap("net.layer")) as again:
                compare_all(again)
                assert again.shortcut
            compare_all(again)  # the records are gone: full passes

    def test_with_gradients(self):
        """A view made without grad and written to with grad: torch refuses, copies serve."""

        def between(self: Any, x: Tensor) -> Tensor:
            x += self.layer(x)
            return x

        assert_gradients(toy(between), doubles(), tap("layer"))


class TestUserCode:
    """Hooks and forwards that the user has put on the model are run as always, once per pass."""

    @pytest.mark.parametrize("hooked", ["stem", "layer", "act", "head"])
    def test_hook_that_doubles(self, hooked: str):
        model = toy(lambda self, x: self.act(self.layer(x)) + x, act=nn.GELU())
        model.get_submodule(hooked).register_forward_hook(lambda _, __, output: output * 2)
        check(model, doubles(), tap("layer"))

    def test_hook_that_calls_a_module(self):
        model = toy(extra=nn.Conv2d(4, 4, 1))
        model.stem.register_forward_hook(lambda _, __, output: model.extra(output))
        with untouched(model), frozen(model), replay(model, doubles(), (), tap("layer")) as again:
            with torch.no_grad():
                expected = model(doubles())[[1, 0, 1]]
            rows = torch.tensor([1, 0, 1])
            torch.testing.assert_close(again(again.maps[rows], rows), expected, rtol=0, atol=ATOL)
            assert again.shortcut

    @pytest.mark.parametrize("patched", ["stem", "layer", "head"])
    def test_instance_level_forward(self, patched: str):
        model = toy()
        module = model.get_submodule(patched)
        live = module.forward
        module.forward = lambda x: live(x) * 3
        mine = module.forward
        check(model, doubles(), tap("layer"))
        assert module.forward is mine

    @pytest.mark.parametrize("where", ["recording", "check", "replay", "caller"])
    def test_exception(self, where: str):
        """What the model raises comes out as it is, and nothing stays behind."""
        fuse = {"recording": 1, "check": 2, "replay": 3, "caller": 99}[where]

        class Fused(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                self.passes = getattr(self, "passes", 0) + 1
                if self.passes >= fuse:
                    raise KeyError("fuse")
                return x

        model = toy(lambda self, x: self.fuse(self.layer(x) + x), fuse=Fused())
        model.fuse.passes = 0

        def explain() -> None:
            with frozen(model), replay(model, doubles(), (), tap("layer")) as again:
                again(again.maps, torch.arange(2))
                raise KeyError("fuse")

        with untouched(model), pytest.raises(KeyError, match="fuse"):
            explain()

    def test_out_of_memory_is_the_callers_business(self):
        model = toy()
        with frozen(model) as bare, replay(model, doubles(), (), tap("layer")) as again:

            def burst(_: Any, __: Any) -> None:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

            handle = bare.head.register_forward_pre_hook(burst)
            with pytest.raises(torch.cuda.OutOfMemoryError):
                again(again.maps, torch.arange(2))
            handle.remove()
            assert again.shortcut, "a smaller chunk may fit"


class TestFullPasses:
    """What recorded outputs cannot reproduce is noticed, and all of the model runs."""

    def wrong_shortcut(self, model: nn.Module, inputs: Tensor, at: Tap, caplog: pytest.LogCaptureFixture) -> None:
        """As ``check``, but the reference may work in place: the model relies on it."""
        caplog.set_level(logging.INFO, "attrib_zoo.backbone.replay")
        twin = copy.deepcopy(model)
        with untouched(model, inputs), frozen(model), replay(model, inputs, (), at) as again:
            for rows in ([1, 0], *CHUNKS):  # first as many rows as images, where no shape can be wrong
                index = torch.tensor(rows)
                maps = disturbed(again.maps[index])
                with torch.no_grad():
                    expected = full_forward(twin, inputs[index], at, maps)
                torch.testing.assert_close(again(maps, index), expected, rtol=0, atol=ATOL)
            assert not again.shortcut
        assert caplog.messages == [f"Model cannot be run from {at.name!r} alone; running all of it"]

    def test_module_whose_return_value_is_ignored(self, caplog: pytest.LogCaptureFixture):
        def between(self: Any, x: Tensor) -> Tensor:
            self.act(x)  # the record of `stem` is older
            return self.layer(x) + x

        self.wrong_shortcut(toy(between, act=nn.ReLU(inplace=True)), doubles(), tap("layer"), caplog)

    def test_table_as_long_as_the_batch(self, caplog: pytest.LogCaptureFixture):
        """Two heads and two images: the bias of a head is not a row of an image."""

        class Table(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(torch.tensor([[0.5], [-1.5]]))

            def forward(self) -> Tensor:
                return self.bias * 1.0

        def between(self: Any, x: Tensor) -> Tensor:
            heads = self.table()
            return (self.layer(x).unflatten(1, (2, 2)) + heads.view(1, 2, 1, 1, 1)).flatten(1, 2)

        self.wrong_shortcut(toy(between, table=Table()), doubles(), tap("layer"), caplog)

    def test_value_kept_on_a_module(self, caplog: pytest.LogCaptureFixture):
        class Keeps(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                self.kept = x * 2
                return x

        def between(self: Any, x: Tensor) -> Tensor:
            return self.layer(self.keeps(x)) + self.keeps.kept

        model = toy(between, keeps=Keeps())
        model.keeps.kept = None
        self.wrong_shortcut(model, doubles(), tap("layer"), caplog)

    def test_control_flow_by_batch_size(self, caplog: pytest.LogCaptureFixture):
        def between(self: Any, x: Tensor) -> Tensor:
            return self.layer(self.side(x) if len(x) == 2 else x)

        self.wrong_shortcut(toy(between, side=nn.Conv2d(4, 4, 1)), doubles(), tap("layer"), caplog)

    def test_number_of_images_kept_by_a_module(self, caplog: pytest.LogCaptureFixture):
        class Sizes(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, int]:
                return x, len(x)

        def between(self: Any, x: Tensor) -> Tensor:
            x, count = self.sizes(x)
            return self.layer(x).view(count, 4, 32, 32)

        self.wrong_shortcut(toy(between, sizes=Sizes()), doubles(), tap("layer"), caplog)

    def test_table_that_is_written_to(self, caplog: pytest.LogCaptureFixture):
        """The first replay gives the right answer and spoils the record of the next."""

        class Table(nn.Module):
            def forward(self) -> Tensor:
                return torch.ones(4, 1, 1, dtype=torch.float64)

        def between(self: Any, x: Tensor) -> Tensor:
            return self.table().mul_(2) * self.layer(x)

        self.wrong_shortcut(toy(between, table=Table()), doubles(), tap("layer"), caplog)


class TestReuse:
    """A module that runs three times, before, at and behind the layer."""

    @staticmethod
    def model() -> nn.Module:
        def between(self: Any, x: Tensor) -> Tensor:
            return self.act(self.layer(self.act(x - 0.1)) + self.act(self.layer(x)))

        return toy(between, act=nn.SiLU())

    @pytest.mark.parametrize(("name", "calls"), [("act", 3), ("layer", 2)])
    def test_each_call_as_layer(self, name: str, calls: int):
        for call in (*range(calls), -1):
            check(self.model(), doubles(), tap(name, calls=calls, call=call))

    def test_calls_inside_an_enclosing_module(self):
        """A shared block: its first run is a record, its second encloses the layer, its third runs live."""

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Conv2d(4, 4, 3, padding=1)
                self.act = nn.SiLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(self.inner(self.act(x))) + x

        model = toy(lambda self, x: self.block(self.block(self.block(self.layer(x)))), block=Block())
        for call in range(3):
            check(model, doubles(), tap("block.inner", calls=3, call=call))
            check(model, doubles(), tap("block", calls=3, call=call))
        for call in range(6):
            check(model, doubles(), tap("block.act", calls=6, call=call))

    def test_layer_that_runs_inside_a_stranger(self):
        """Its name does not say which modules it runs inside; what these have run before it is run again."""

        class Runner(nn.Module):
            def __init__(self, *parts: nn.Module) -> None:
                super().__init__()
                self.parts = parts  # a tuple, which registers nothing

            def forward(self, x: Tensor) -> Tensor:
                for part in self.parts:
                    x = part(x) + 0.1
                return x

        side, layer = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        model = toy(lambda self, x: self.runner(x), runner=Runner(side, layer, side), side=side, inner=layer)
        check(model, doubles(), tap("inner"))
        model = toy(lambda self, x: self.runner(self.runner(x)), runner=Runner(side, layer), side=side, inner=layer)
        check(model, doubles(), tap("inner", calls=2, call=0))
        check(model, doubles(), tap("inner", calls=2, call=1))


def assert_gradients(model: nn.Module, inputs: Tensor, at: Tap, plain: nn.Module | None = None) -> None:
    """Gradients with respect to the maps against those of full forward passes."""
    twin = cases.out_of_place(plain or model)
    with untouched(model, inputs), frozen(model), replay(model, inputs, (), at) as again:
        for rows in CHUNKS:
            index = torch.tensor(rows)
            leaf, other = (disturbed(again.maps[index]).requires_grad_() for _ in range(2))
            (found,) = torch.autograd.grad(again(leaf, index)[:, 1].sum(), leaf)
            (expected,) = torch.autograd.grad(full_forward(twin, inputs[index], at, other)[:, 1].sum(), other)
            torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
            assert expected.abs().max() > 1e5 * ATOL
        assert again.shortcut


class TestGradients:
    @pytest.mark.parametrize("name", ["layer4.0.downsample", "layer4.1.bn2", "layer4.1", "layer3.0.conv2", "conv1"])
    @pytest.mark.parametrize("trainable", [True, False])
    def test_resnet(self, name: str, trainable: bool):
        assert_gradients(cases.resnet().double().requires_grad_(trainable), doubles(), tap(name))

    @pytest.mark.parametrize("name", ["blocks.0.norm1", "blocks.1.mlp.fc1", "blocks.0"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_vit(self, name: str, checkpointing: bool):
        """With checkpointing the backward pass runs the blocks again, when no replay is on any more."""
        model = cases.checkpointed(cases.vit().double()) if checkpointing else cases.vit().double()
        assert_gradients(model, doubles(), tap(name, Grid("tokens", 1, (4, 4))), plain=cases.vit().double())

    def test_follow_the_maps_alone(self):
        model = toy()
        rows = torch.arange(2)
        with frozen(model), replay(model, doubles(), (), tap("layer")) as again:
            with torch.enable_grad():
                assert not again(again.maps, rows).requires_grad
            leaf = again.maps.clone().requires_grad_()
            with torch.no_grad():
                assert again(leaf, rows).requires_grad
                assert not torch.is_grad_enabled()
            assert not again.outputs.requires_grad
            assert not again.maps.requires_grad


class TestConditions:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_modes(self, mode: Callable[[], Any]):
        model, inputs, rows = cases.resnet().double(), doubles(), torch.tensor([1, 0, 0])
        twin = cases.out_of_place(model)
        with mode(), untouched(model, inputs), frozen(model):
            given = inputs.clone()  # an inference tensor in inference mode
            with replay(model, given, (), tap("layer4.1")) as again:
                maps = disturbed(again.maps[rows])
                found = again(maps, rows)
                assert not found.is_inference()
                leaf = again.maps[rows].clone()
                assert again.shortcut
        with torch.no_grad():
            expected = full_forward(twin, inputs[rows], tap("layer4.1"), maps.clone())
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
        assert leaf.shape == maps.shape

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision(self, dtype: torch.dtype):
        model, rows = cases.resnet().to(dtype), torch.tensor([1, 0, 0])
        inputs = cases.images(2).to(dtype)
        with untouched(model, inputs), frozen(model), replay(model, inputs, (), tap("layer4.1.bn2")) as again:
            maps = disturbed(again.maps[rows].float())  # float32 maps for a layer of any type
            found = again(maps, rows)
            assert again.shortcut
        twin = cases.out_of_place(model)
        with torch.no_grad():
            expected = full_forward(twin, inputs[rows], tap("layer4.1.bn2"), maps)
        assert found.dtype == dtype
        atol = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)

    def test_autocast(self):
        model, inputs, rows = cases.vit(), cases.images(2), torch.tensor([1, 0, 0])
        at = tap("blocks.1.attn.qkv", Grid("tokens", 1, (4, 4)))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            with untouched(model, inputs), frozen(model), replay(model, inputs, (), at) as again:
                assert again.maps.dtype == torch.bfloat16
                maps = disturbed(again.maps[rows])
                found = again(maps, rows)
                assert again.shortcut
            expected = full_forward(model, inputs[rows], at, maps)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)

    @pytest.mark.parametrize("form", ["wrapper", "in place", "submodule", "parallel"])
    def test_wrapped(self, form: str):
        model, inputs = cases.resnet().double(), doubles()
        bare = model
        if form == "wrapper":
            model = torch.compile(model, backend="eager")
        elif form == "in place":
            model.compile(backend="eager")
        elif form == "submodule":
            model.layer4[1] = torch.compile(model.layer4[1], backend="eager")
        else:
            model = nn.DataParallel(model)
        with torch.no_grad():
            model(inputs)  # warm: a compiled model fires no hooks any more
        plain = cases.resnet().double()
        rows = torch.tensor([1, 0, 0])
        runs = counted(bare.get_submodule("layer4.1._orig_mod.conv1" if form == "submodule" else "layer4.1.conv1"))
        for name in ["layer4.1.bn2", "layer4.1"]:
            with untouched(bare, inputs), frozen(model), replay(model, inputs, (), tap(name)) as again:
                maps = disturbed(again.maps[rows])
                with torch.no_grad():
                    expected = full_forward(plain, inputs[rows], tap(name), maps)
                torch.testing.assert_close(again(maps, rows), expected, rtol=0, atol=ATOL)
                assert again.shortcut
        assert runs == [2, 2], "once in each recording, never in a replay"
        torch._dynamo.reset()

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
    def test_scripted_parts(self):
        """They take no hooks; they run again."""
        act = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU()))
        model = toy(lambda self, x: self.act(self.layer(self.act(x))), act=act.double())
        check(model, doubles(), tap("layer"))

    def test_additional_arguments(self):
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Toy()

            def forward(self, x: Tensor, scale: Tensor, shift: Tensor, name: str) -> Tensor:
                assert name == "given"
                return self.net(x) * scale[:, None] + shift.sum()

        model = cases.lively(Scaled()).double()
        args = (torch.tensor([1.0, -2.0]).double(), torch.tensor([1.0, 2.0, 4.0]).double(), "given")
        check(model, doubles(), tap("net.layer"), args=args)


class TestOutputs:
    """Modules that put out more than one tensor."""

    def test_nested_records(self):
        class Many(nn.Module):
            def forward(self, x: Tensor) -> dict[str, Any]:
                return {"pair": (x * 2, [x.flip(3), 0.5]), "table": torch.arange(4.0), "none": None}

        def between(self: Any, x: Tensor) -> Tensor:
            many = self.many(x)
            (a, (b, scale)), table = many["pair"], many["table"]
            return self.layer(x) * scale + a - b * table.view(1, 4, 1, 1)

        check(toy(between, many=Many()), doubles(), tap("layer"))

    @pytest.mark.parametrize("element", [1, "named", "mapped"])
    def test_one_of_several(self, element: int | str):
        from collections import OrderedDict, namedtuple

        pair = namedtuple("pair", ["rest", "map"])
        build = {
            1: lambda rest, y: (rest, y),
            "named": lambda rest, y: pair(rest, y),
            "mapped": lambda rest, y: OrderedDict(rest=rest, map=y),
        }[element]
        key: int | str = "map" if element == "mapped" else 1

        class Several(nn.Conv2d):
            def forward(self, x: Tensor) -> Any:
                return build(x + 1, super().forward(x))

        def between(self: Any, x: Tensor) -> Tensor:
            out = self.several(x)
            if element == "named":
                return out.map * out.rest
            return out[key] * out["rest" if element == "mapped" else 0]

        model, inputs, rows = toy(between, several=Several(4, 4, 3, padding=1)), doubles(), torch.tensor([1, 0, 0])
        with untouched(model), frozen(model), replay(model, inputs, (), tap("several", element=key)) as again:
            maps = disturbed(again.maps[rows])
            found = again(maps, rows)
            assert again.shortcut
        with torch.no_grad():
            rest = model.stem(inputs)[rows] + 1
            expected = model.head((maps * rest).tanh().mean((2, 3)))
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


class TestChunks:
    """How the rows are cut into chunks changes nothing."""

    @pytest.mark.parametrize("name", ["layer4.0.downsample", "layer4.1.bn2", "layer3"])
    def test_any_cut(self, name: str):
        model, inputs = cases.resnet().double(), doubles(3)
        with frozen(model), replay(model, inputs, (), tap(name)) as again:

            @settings(max_examples=15, deadline=None, derandomize=True)
            @given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=3))
            def cut(chunks: list[list[int]]) -> None:
                rows = torch.tensor([row for chunk in chunks for row in chunk])
                maps = disturbed(again.maps[rows])
                sizes = [len(chunk) for chunk in chunks]
                parts = [again(m, r) for m, r in zip(maps.split(sizes), rows.split(sizes), strict=True)]
                torch.testing.assert_close(torch.cat(parts), again(maps, rows), rtol=0, atol=ATOL)

            cut()
            assert again.shortcut


def counted(module: nn.Module) -> list[int]:
    """The batch of each forward that truly runs; a hook would also see the replays."""
    runs: list[int] = []
    live = module.forward

    def forward(x: Tensor) -> Tensor:
        runs.append(len(x))
        return live(x)

    module.forward = forward
    return runs


class TestCost:
    def test_only_the_tail_is_computed(self):
        model, inputs = cases.resnet(), cases.images(2, 64)
        with FlopCounterMode(display=False) as one, torch.no_grad():
            model(inputs)
        stem, head = counted(model.layer1[0].conv1), counted(model.fc)
        rows = torch.zeros(8, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter, frozen(model), replay(model, inputs, (), tap("layer4.1")) as again:
            for _ in range(4):
                again(again.maps[rows], rows)
        assert sum(stem) == 2, "the two images, once"
        assert sum(head) == 2 + 2 + 4 * 8, "clean, self-check, replays"
        head_flops = 2 * model.fc.weight.numel()
        assert counter.get_total_flops() == one.get_total_flops() + (2 + 4 * 8) * head_flops

    def test_records_end_with_the_block(self):
        model, rows = toy(), torch.arange(2)
        with frozen(model) as bare, replay(model, doubles(), (), tap("layer")) as again:
            pass
        runs = counted(bare.stem)
        torch.testing.assert_close(again(again.maps, rows), again.outputs, rtol=0, atol=ATOL)
        assert runs == [2], "nothing is kept, so all of it runs"


class TestErrors:
    def test_layer_that_does_not_run(self):
        model = toy(idle=nn.Conv2d(4, 4, 1))
        with (
            untouched(model),
            frozen(model),
            pytest.raises(LayerError, match=r"layers: 'idle' must run 1 time\(s\) in a forward pass, ran 0"),
            replay(model, doubles(), (), tap("idle")),
        ):
            pass

    def test_layer_that_runs_more_often_than_said(self):
        model = TestReuse.model()
        with (
            untouched(model),
            frozen(model),
            pytest.raises(LayerError, match=r"'act' must run 2 time\(s\) in a forward pass, ran 3"),
            replay(model, doubles(), (), tap("act", calls=2)),
        ):
            pass

    def test_rows(self):
        model = toy()
        message = "rows: must name an image for each of the 2 maps, got 3"
        with (
            frozen(model),
            replay(model, doubles(), (), tap("layer")) as again,
            pytest.raises(InputError, match=message),
        ):
            again(again.maps, torch.zeros(3).long())
