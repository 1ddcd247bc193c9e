"""Capture against plain backward passes through a copy without in-place modules."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import engine_cases as cases
import pytest
import torch
from engine_cases import tap, untouched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attrib_zoo.backbone.capture import evaluating, forward, frozen, run, run_with_graph, select_args, unwrap
from attrib_zoo.backbone.grid import Grid, Tap
from attrib_zoo.errors import InputError, LayerError, UnsupportedModelError

TOKENS = Grid("tokens", 1, (4, 4))
CNN_TAPS = [
    ["conv1"],  # the first convolution
    ["bn1"],  # before an in-place ReLU
    ["layer4.1.bn1"],
    ["layer4.1.bn2"],  # before `+=`
    ["layer3.0.downsample"],  # what `+=` adds
    ["layer2.0.conv1"],
    ["layer4.1"],  # the last block
    ["layer4"],
    ["layer2.0.bn2", "layer3.0.bn1", "layer4.1.bn2"],
    ["layer4.1.bn2", "conv1", "layer3"],  # not in the order of execution
]


def gradients(model: nn.Module, inputs: Tensor, taps: list[Tap], args: tuple[Any, ...] = ()) -> Any:
    """Outputs, maps and gradients of the sum of each image's class 1."""
    with frozen(model), run_with_graph(model, inputs, args, taps) as (outputs, maps):
        found = torch.autograd.grad(outputs[:, 1].sum(), maps)
        return outputs.detach(), [m.detach() for m in maps], list(found)


def compare(
    model: nn.Module, inputs: Tensor, taps: list[Tap], atol: float = 0.0, plain: nn.Module | None = None
) -> None:
    """Outputs, maps and gradients against a plain backward pass; both kinds of capture; nothing left behind."""
    outputs, activations, expected = cases.reference(plain or model, inputs, [(t.name, t.call % t.calls) for t in taps])
    expected = [t.grid.to_map(g) for t, g in zip(taps, expected, strict=True)]
    activations = [t.grid.to_map(a) for t, a in zip(taps, activations, strict=True)]
    close = {"rtol": 0, "atol": atol, "check_dtype": True}
    with untouched(model, inputs):
        found, maps, grads = gradients(model, inputs, taps)
        with frozen(model):
            same, copies = run(model, inputs, (), taps)
    for one, other in [(found, outputs), (same, outputs)]:
        torch.testing.assert_close(one, other, **close)
        assert not one.requires_grad
    for one, two, other in zip(maps, copies, activations, strict=True):
        torch.testing.assert_close(one, other, **close)
        torch.testing.assert_close(two, other, **close)
    for one, other in zip(grads, expected, strict=True):
        assert other.abs().max() > 1e4 * atol
        torch.testing.assert_close(one, other, **close)


def of(model: nn.Module, inputs: Tensor, names: list[str], *, nhwc: bool = False) -> list[Tap]:
    shapes = cases.survey(unwrap(model), inputs)
    return [tap(name, cases.grid_of(shapes[name][-1], nhwc=nhwc), calls=len(shapes[name])) for name in names]


class TestLayers:
    @pytest.mark.parametrize("names", CNN_TAPS, ids="+".join)
    def test_resnet(self, names: list[str]):
        model, inputs = cases.resnet(), cases.images(2)
        compare(model, inputs, of(model, inputs, names))

    @pytest.mark.parametrize("names", [["blocks.1.norm1"], ["blocks.0.mlp.fc2", "blocks.1.norm1"], ["patch_embed"]])
    def test_vit(self, names: list[str]):
        model, inputs = cases.vit(), cases.images(2)
        compare(model, inputs, of(model, inputs, names), atol=1e-7)

    @pytest.mark.parametrize("names", [["encoder.layers.encoder_layer_1.ln_1"], ["encoder.dropout", "encoder.ln"]])
    def test_fused_attention(self, names: list[str]):
        model, inputs = cases.fused_vit(), cases.images(2)
        compare(model, inputs, of(model, inputs, names), atol=1e-6)

    @pytest.mark.parametrize("names", [["layers.0"], ["layers.1.blocks.0.norm1", "layers.1"]])
    def test_swin(self, names: list[str]):
        model, inputs = cases.swin(), cases.images(2, 16)
        compare(model, inputs, of(model, inputs, names, nhwc=True), atol=1e-7)

    @pytest.mark.parametrize("names", [["features.conv0"], ["features.denseblock1", "features.denseblock2"]])
    def test_densenet(self, names: list[str]):
        model, inputs = cases.densenet(), cases.images(2)
        compare(model, inputs, of(model, inputs, names))

    @pytest.mark.parametrize("call", [0, 1, 2, -1, -3])
    def test_each_call_of_a_module_that_runs_three_times(self, call: int):
        model, inputs = cases.bottleneck(), cases.images(2)
        compare(model, inputs, [tap("layer3.0.relu", calls=3, call=call)])

    def test_two_calls_of_one_module(self):
        model, inputs = cases.bottleneck(), cases.images(2)
        compare(model, inputs, [tap("layer3.0.relu", calls=3, call=call) for call in (2, 0)])

    def test_parallel_branches(self):
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
                self.head = nn.Linear(4, cases.CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                return self.head((self.left(x) * self.right(x)).mean((2, 3)))

        for trainable in (True, False):
            model = cases.lively(Branches()).double().requires_grad_(trainable)
            compare(model, cases.images(2, dtype=torch.float64), [tap("left"), tap("right")], atol=1e-12)

    def test_layer_that_hands_on_its_input(self):
        """A dropout in eval mode: the skip around it shares its storage, and is changed in place afterwards."""

        class Skip(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.drop, self.next = nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Conv2d(4, 4, 1)
                self.head = nn.Linear(4, cases.CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                y = self.next(self.drop(x))
                x += y.sigmoid()
                return self.head((x * y).mean((2, 3)))

        model, inputs = cases.lively(Skip()).double(), cases.images(2, dtype=torch.float64)
        _, maps, found = gradients(model, inputs, [tap("stem"), tap("drop")])
        stem = model.stem(inputs).detach().requires_grad_()
        drop = stem.clone()
        y = model.next(drop)
        (expected,) = torch.autograd.grad(model.head(((stem + y.sigmoid()) * y).mean((2, 3)))[:, 1].sum(), drop)
        torch.testing.assert_close(maps[1], stem.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-12)

    def test_hooks_of_the_user_come_first(self):
        """The activation is what the rest of the model sees."""
        model, inputs = cases.resnet(), cases.images(2)
        model.layer4[1].bn2.register_forward_hook(lambda _, __, output: output * 2)
        compare(model, inputs, [tap("layer4.1.bn2")])


class TestConditions:
    @pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("trainable", [True, False])
    @pytest.mark.parametrize("names", [["conv1"], ["layer3", "layer4.1.bn1"]])
    def test_modes(self, names: list[str], trainable: bool, mode: Callable[[], Any]):
        model, inputs = cases.resnet().requires_grad_(trainable), cases.images(2)
        expected = cases.reference(cases.resnet(), inputs, [(name, 0) for name in names])
        taps = [tap(name) for name in names]
        with mode(), untouched(model, inputs):
            given = inputs.clone()  # an inference tensor in inference mode
            assert given.is_inference() is torch.is_inference_mode_enabled()
            for found in [gradients(model, given, taps), gradients(model, inputs, taps)]:
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
            with frozen(model):
                outputs, maps = run(model, given, (), taps)
        assert not any(t.is_inference() for t in (*maps, outputs, *found[1], *found[2]))
        torch.testing.assert_close((outputs, maps), expected[:2], rtol=0, atol=0)

    def test_inputs_that_require_grad(self):
        model, inputs = cases.resnet(), cases.images(2).requires_grad_()
        compare(model, inputs, [tap("layer4")])
        assert inputs.grad is None

    def test_arguments_made_in_inference_mode(self):
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = cases.ResNet()

            def forward(self, x: Tensor, scale: Tensor) -> Tensor:
                return self.net(x) * scale[:, None]

        model, inputs = cases.lively(Scaled()), cases.images(2)
        with torch.inference_mode():
            scale = torch.tensor([2.0, -1.0])
            _, _, found = gradients(model, inputs, [tap("net.layer4")], (scale,))
        _, _, expected = cases.reference(model, inputs, [("net.layer4", 0)], (torch.tensor([2.0, -1.0]),))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_precision(self, dtype: torch.dtype):
        model, inputs = cases.resnet().to(dtype), cases.images(2).to(dtype)
        compare(model, inputs, [tap("layer3"), tap("layer4.1.bn2")])
        model = cases.vit().to(dtype)
        compare(model, inputs, [tap("blocks.1.norm1", TOKENS)], atol=1e-12 if dtype == torch.float64 else 0.0)

    def test_autocast(self):
        model, inputs = cases.vit(), cases.images(2)
        with torch.autocast("cpu", torch.bfloat16):
            _, maps, (found,) = gradients(model, inputs, [tap("blocks.1.attn.qkv", TOKENS)])
            _, _, (expected,) = cases.reference(model, inputs, [("blocks.1.attn.qkv", 0)])
        assert maps[0].dtype == found.dtype == torch.bfloat16
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, TOKENS.to_map(expected), rtol=0, atol=0.02 * scale)

    @pytest.mark.parametrize("form", ["wrapper", "in place", "submodule", "function"])
    def test_warm_compiled_model(self, form: str):
        """A compiled model that has run fires no hook; nothing may be compiled again either."""
        compiled = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        bare = model = cases.resnet()
        inputs = cases.images(2)
        if form == "wrapper":
            model = torch.compile(bare, backend=backend)
        elif form == "in place":
            bare.compile(backend=backend)
        elif form == "submodule":
            bare.layer4[1] = torch.compile(bare.layer4[1], backend=backend)
        else:
            bare.layer4.forward = torch.compile(bare.layer4.forward, backend=backend)
        with torch.no_grad():
            model(inputs)
        count = len(compiled)
        assert count
        taps = [tap("layer4.1.bn1"), tap("layer4.1")]
        expected = cases.reference(cases.resnet(), inputs, [(t.name, 0) for t in taps])
        with untouched(bare, inputs):
            found = gradients(model, inputs, taps)
            with frozen(model):
                copies = run(model, inputs, (), taps)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(copies, expected[:2], rtol=0, atol=0)
        with torch.no_grad():
            model(inputs)
        assert len(compiled) == count, "compiled again"
        torch._dynamo.reset()

    def test_data_parallel(self):
        model, inputs = nn.DataParallel(cases.resnet()), cases.images(2)
        expected = cases.reference(cases.resnet(), inputs, [("layer4.1.bn2", 0)])
        with untouched(model.module, inputs):
            found = gradients(model, inputs, [tap("layer4.1.bn2")])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("names", [["blocks.0.norm1"], ["blocks.1.attn.qkv", "blocks.1.mlp.fc1"], ["blocks.1"]])
    def test_checkpointing(self, names: list[str]):
        """Blocks are run again in the backward pass, when no hook is on any more."""
        model, inputs = cases.checkpointed(cases.vit()), cases.images(2)
        compare(model, inputs, [tap(name, TOKENS) for name in names], atol=1e-7, plain=cases.vit())


class Guarded(nn.Module):
    """A layer, and behind it something that may stop gradients."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, cases.CLASSES)
        self.idle = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.block(x)
        elif self.how == "unused":
            self.idle(x)
            x = self.block(x)
        elif self.how != "raises":
            x = checkpoint(self.block, x, use_reentrant=self.how == "reentrant")
        else:
            raise KeyError("tail")
        return self.head(x.mean((2, 3)))


class TestErrors:
    @staticmethod
    def model(how: str) -> nn.Module:
        return cases.lively(Guarded(how)).requires_grad_(False)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    @pytest.mark.parametrize(
        ("how", "name"), [("no_grad", "layer"), ("no_grad", "block.0"), ("reentrant", "block.0"), ("unused", "idle")]
    )
    def test_no_path(self, how: str, name: str):
        model, inputs = self.model(how), cases.images(2)
        with (
            untouched(model, inputs),
            pytest.raises(LayerError, match=f"no gradient path from '{name}' to the outputs"),
        ):
            gradients(model, inputs, [tap(name)])

    def test_reentrant_checkpointing_behind_the_layer(self):
        model, inputs = self.model("reentrant"), cases.images(2)
        with (
            untouched(model, inputs),
            pytest.raises(UnsupportedModelError, match="Guarded uses reentrant checkpointing"),
        ):
            gradients(model, inputs, [tap("layer")])

    def test_other_errors_of_the_caller_come_out_as_they_are(self):
        model, inputs = self.model("plain"), cases.images(2)
        with (
            untouched(model, inputs),
            frozen(model),
            pytest.raises(RuntimeError, match=r"^mine$"),
            run_with_graph(model, inputs, (), [tap("layer")]),
        ):
            raise RuntimeError("mine")

    def test_model_that_raises(self):
        model, inputs = self.model("raises"), cases.images(2)
        with untouched(model, inputs), pytest.raises(KeyError, match="tail"):
            gradients(model, inputs, [tap("layer")])
        with untouched(model, inputs), pytest.raises(KeyError, match="tail"), frozen(model):
            run(model, inputs, (), [tap("layer")])

    @pytest.mark.parametrize(("name", "calls", "ran"), [("idle", 1, 0), ("layer", 2, 1)])
    def test_count(self, name: str, calls: int, ran: int):
        model, inputs = self.model("plain"), cases.images(2)
        message = rf"layers: '{name}' must run {calls} time\(s\) in a forward pass, ran {ran}"
        with untouched(model, inputs), pytest.raises(LayerError, match=message), frozen(model):
            run(model, inputs, (), [tap(name, calls=calls)])

    def test_output_that_is_no_tensor(self):
        model, inputs = cases.lively(Several(lambda a, b: (a, b))), cases.images(2)
        with untouched(model, inputs), pytest.raises(LayerError, match="'pair' must put out a tensor, got tuple"):
            gradients(model, inputs, [tap("pair")])

    @pytest.mark.parametrize("kind", ["parameters", "buffers"])
    def test_weights_made_in_inference_mode(self, kind: str):
        model = cases.resnet()
        with torch.inference_mode():
            if kind == "buffers":
                model.bn1.running_mean = model.bn1.running_mean.clone()
            else:
                model.bn1.weight = nn.Parameter(model.bn1.weight.clone())
        with pytest.raises(UnsupportedModelError, match="build or load the model outside inference_mode"):
            gradients(model, cases.images(2), [tap("conv1")])

    def test_channels(self):
        with pytest.raises(InputError, match=r"ResNet takes images with 3 channels, got 1 .*pass \(N, 3, H, W\)"):
            forward(cases.resnet(), torch.zeros(2, 1, 32, 32))


Pair = namedtuple("Pair", ["first", "second"])


class Several(nn.Module):
    """A layer that puts out two tensors."""

    def __init__(self, build: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()

        class Both(nn.Conv2d):
            def forward(self, x: Tensor) -> Any:
                y = super().forward(x)
                return build(y.tanh(), y)

        self.pair = Both(3, 4, 3)
        self.head = nn.Linear(4, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.pair(x)
        first, second = pair.values() if isinstance(pair, dict) else pair
        return self.head((first * second.mul_(2)).mean((2, 3)))


class TestElements:
    @pytest.mark.parametrize(
        ("build", "element"),
        [
            (lambda a, b: (a, b), 1),
            (lambda a, b: [a, b], 1),
            (lambda a, b: Pair(a, b), 1),
            (lambda a, b: OrderedDict(a=a, b=b), "b"),
        ],
    )
    def test_one_of_several(self, build: Callable[[Tensor, Tensor], Any], element: int | str):
        model, inputs = cases.lively(Several(build)).double(), cases.images(2, dtype=torch.float64)
        y = nn.functional.conv2d(inputs, model.pair.weight, model.pair.bias).detach()
        leaf = y.clone().requires_grad_()
        score = model.head((y.tanh() * leaf * 2).mean((2, 3)))[:, 1].sum()
        (expected,) = torch.autograd.grad(score, leaf)
        with untouched(model, inputs):
            _, (maps,), (found,) = gradients(model, inputs, [tap("pair", element=element)])
        torch.testing.assert_close(maps, y, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class TestFrozen:
    def test_flags_come_back_one_by_one(self):
        model = cases.resnet().train()
        model.layer2.eval()
        model.layer4[1].bn1.eval()
        with untouched(model), frozen(model) as bare:
            assert not any(module.training for module in bare.modules())
        with untouched(model), evaluating(model) as bare:
            assert bare is model
            assert not any(module.training for module in model.modules())

    def test_after_an_error(self):
        model = cases.resnet().train()
        for block in (frozen, evaluating):
            with untouched(model), pytest.raises(KeyError), block(model):
                raise KeyError

    def test_batch_statistics_stay(self):
        model, inputs = cases.resnet().train(), cases.images(2)
        compare(model, inputs, [tap("layer4")], plain=cases.resnet())

    def test_what_a_module_caches_in_eval_mode_is_dropped(self):
        """LeViT's attention does this: a cache of a parameter, dropped by ``train``."""

        class Caching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(()))
                self.cache: dict[str, Tensor] = {}

            def train(self, mode: bool = True) -> nn.Module:
                super().train(mode)
                if mode:
                    self.cache = {}
                return self

            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    return x + self.bias
                if not self.cache:
                    self.cache["bias"] = self.bias.detach().clone()
                return x + self.cache["bias"]

        model = nn.Sequential(Caching(), nn.Dropout()).train()
        model[1].eval()
        for value in (1.0, 2.0):
            with torch.no_grad():
                model[0].bias.fill_(value)
            with frozen(model) as bare:
                assert bare(torch.zeros(1)) == value
            assert not model[0].cache
            with evaluating(model):
                assert model(torch.zeros(1)) == value
        assert [m.training for m in model.modules()] == [True, True, False]


def test_select_args():
    rows = torch.tensor([1, 1, 0])
    kept = ("text", None, torch.tensor(3.0), torch.arange(5))
    picked = select_args((torch.tensor([10, 20]), *kept), rows, 2)
    assert picked[0].tolist() == [20, 20, 10]
    assert all(a is b for a, b in zip(picked[1:], kept, strict=True))


class TestCost:
    """The graph begins at the layer."""

    @staticmethod
    def saved_megabytes(model: nn.Module, inputs: Tensor, at: Tap) -> float:
        """What autograd keeps for the backward pass, each storage once, parameters and buffers not counted."""
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients(model, inputs, [at])
        return sum(storage.nbytes() for storage in storages.values()) / 2**20

    @pytest.mark.parametrize("trainable", [True, False])
    def test_saved_for_backward(self, trainable: bool):
        from torchvision.models import resnet18

        model, inputs = resnet18().eval().requires_grad_(trainable), cases.images(2, 224)
        assert self.saved_megabytes(model, inputs, tap("layer4.1")) <= 0.05 * len(inputs)
        assert self.saved_megabytes(model, inputs, tap("conv1")) > 10 * len(inputs), "the measure must be able to fail"

    def test_flops(self):
        from torchvision.models import resnet18

        model, inputs = resnet18().eval(), cases.images(1, 224)
        plain, explained, whole = (FlopCounterMode(display=False) for _ in range(3))
        with plain, torch.no_grad():
            model(inputs)
        with explained:
            gradients(model, inputs, [tap("layer4")])
        with whole:
            gradients(model, inputs, [tap("conv1")])
        assert explained.get_total_flops() <= 1.01 * plain.get_total_flops()
        assert whole.get_total_flops() > 1.5 * plain.get_total_flops(), "the measure must be able to fail"

    def test_backward_does_not_reach_the_stem(self):
        model, inputs = cases.resnet(), cases.images(2)
        reached = []
        model.conv1.register_full_backward_hook(lambda *_: reached.append("stem"))
        model.fc.register_full_backward_hook(lambda *_: reached.append("head"))
        gradients(model, inputs, [tap("layer4")])
        assert reached == ["head"]
