"""Models as people have them: wrapped, compiled, normalising, with outputs in a container, in bf16, quantised."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from engine_cases import lively, resnet, swin, untouched, vit
from torch import Tensor, nn

from attrib_zoo import RISE, TTAME, GradCAM, ScoreCAM
from attrib_zoo.errors import InputError, LayerError, UnsupportedModelError

SIZE = 64


def images(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size)


def heat(model: nn.Module, inputs: Tensor, **options: Any) -> Tensor:
    return GradCAM(model, upsample=False, **options).attribute(inputs, target=1)


# --- wrappers -------------------------------------------------------------------------------------------------------


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_parallel(model: nn.Module) -> nn.Module:
    return torch.compile(nn.DataParallel(model), backend="eager")


def in_place_compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def warm(wrap: Any) -> Any:
    def build(model: nn.Module) -> nn.Module:
        model = wrap(model)
        with torch.no_grad():
            model(images(2, 32))
        return model

    return build


WRAPPERS = {
    "DataParallel": parallel,
    "compiled, cold": compiled,
    "compiled, warm": warm(compiled),
    "DataParallel, compiled": compiled_parallel,
    "compiled in place, cold": in_place_compiled,
    "compiled in place, warm": warm(in_place_compiled),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_changes_nothing(name):
    inputs = images(2, 32)
    expected = heat(vit(), inputs)
    assert expected.any()
    wrapped = WRAPPERS[name](vit())
    with untouched(wrapped, inputs):
        found = heat(wrapped, inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(wrapped(inputs), vit()(inputs))  # and it still works, hooks or not


class GradSampleModule(nn.Module):
    """What Opacus wraps a model in: the model under ``_module``, with hooks that record while it trains."""

    def __init__(self, module):
        super().__init__()
        self._module = module

    def forward(self, *args):
        return self._module(*args)


def test_models_in_opacus_and_their_forward_methods():
    inputs = images(2, 32)
    expected = heat(vit(), inputs)
    torch.testing.assert_close(heat(GradSampleModule(vit()), inputs), expected)
    torch.testing.assert_close(heat(vit().forward, inputs), expected)


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped, inputs = nn.parallel.DistributedDataParallel(resnet()), images()
        torch.testing.assert_close(heat(wrapped, inputs), heat(resnet(), inputs))
        torch.testing.assert_close(
            heat(wrapped, inputs, layers="module.layer3"), heat(resnet(), inputs, layers="layer3")
        )
    finally:
        torch.distributed.destroy_process_group()


class Normalise(nn.Module):
    """What people put before a model, so that it takes pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


@pytest.mark.parametrize(
    ("build", "size", "layer"), [(resnet, 64, "1.layer4"), (vit, 32, "1.blocks.2"), (swin, 16, "")]
)
def test_a_model_behind_its_normalisation(build, size, layer):
    inputs = torch.rand(2, 3, size, size)
    model = nn.Sequential(Normalise(), build()).eval()
    torch.testing.assert_close(heat(model, inputs), heat(build(), (inputs - 0.5) / 0.25))
    if layer:
        assert [tap.name for tap in GradCAM(model).taps(inputs)] == [layer]


class Module(nn.Module):
    """Like a Lightning module: a model as an attribute, a loss, metrics, hooks of its own, a forward that hands on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss()
        self.metrics = nn.ModuleDict({"loss": nn.Identity()})
        self.trainer, self.hparams = None, {"lr": 0.1}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(x, *args, **kwargs)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])


def test_a_training_module():
    model, inputs = Module(resnet()), images()
    torch.testing.assert_close(heat(model, inputs), heat(resnet(), inputs))
    assert [tap.name for tap in TTAME(model, recipe="paper").taps(inputs)] == [
        "model.layer1",
        "model.layer3",
        "model.layer4",
    ]


class Backbone(nn.Module):
    """A list of feature maps, as timm's ``features_only`` gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = resnet()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body.maxpool(self.body.relu(self.body.bn1(self.body.conv1(x))))
        found = []
        for stage in (self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4):
            x = stage(x)
            found.append(x)
        return found


class OnFeatures(nn.Module):
    """A head of one's own on them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), lively(nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def test_a_head_on_a_list_of_features():
    model, inputs = OnFeatures().eval(), images()
    torch.testing.assert_close(heat(model, inputs), heat(model, inputs, layers="backbone.body.layer4"))
    assert len(TTAME(model, recipe="paper").taps(inputs)) == 3
    with pytest.raises(UnsupportedModelError, match="must return one tensor"):
        heat(Backbone(), inputs)


# --- outputs in a container -------------------------------------------------------------------------------------------


class ModelOutput(OrderedDict[str, Any]):
    """Like that of Hugging Face: an ordered dict that is a dataclass and leaves out what is None."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclass
class ImageClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class ForImageClassification(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.model(pixel_values))


def test_outputs_with_logits_are_taken_as_their_logits():
    model, inputs = ForImageClassification(resnet()).eval(), images()
    torch.testing.assert_close(heat(model, inputs), heat(resnet(), inputs))


# --- types ----------------------------------------------------------------------------------------------------------


HALVES = [torch.bfloat16, torch.float16]
METHODS: dict[str, Any] = {
    "gradient": lambda model, x: GradCAM(model).attribute(x, 1),
    "masked": lambda model, x: ScoreCAM(model).attribute(x, 1),
    "trained": lambda model, x: fitted(model, x).attribute(x),
}


def fitted(model: nn.Module, inputs: Tensor) -> TTAME:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fit: the 'short' schedule needs at least")
        return TTAME(model, recipe="paper").fit([inputs], max_steps=2, show_progress=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("build", "size"), [(resnet, 64), (vit, 32)])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, build, size, dtype):
    inputs = images(2, size)
    found, expected = (METHODS[method](build().to(kind), inputs.to(kind)) for kind in (dtype, torch.float32))
    assert (found.dtype, expected.dtype) == (dtype, torch.float32)
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * scale)


def test_bf16_model_with_images_of_another_type():
    """The error names both types."""
    with pytest.raises(InputError, match=r"weights in torch.bfloat16, got images in torch.float32"):
        heat(resnet().to(torch.bfloat16), images())


# --- int8 -----------------------------------------------------------------------------------------------------------

needs_int8 = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines or not hasattr(torch.ao, "quantization"),
    reason="no quantised operators here",
)


class Quantised(nn.Module):
    """Convolutions in float, linear layers in int8: what dynamic quantisation makes."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.body = torch.ao.quantization.quantize_dynamic(body or resnet(), {nn.Linear}, dtype=torch.qint8)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def of_integers(*, convert: bool = True) -> nn.Module:
    """All of it in int8, by static quantisation; as it is before, in float with observers, if not converted."""
    quantization = torch.ao.quantization
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = lively(nn.Sequential(quantization.QuantStub(), *layers, *head, quantization.DeQuantStub()))
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    model = quantization.fuse_modules(model, [["1", "2"], ["3", "4"]])
    quantization.prepare(model, inplace=True)
    model(images())
    return quantization.convert(model) if convert else model


@needs_int8
@pytest.mark.filterwarnings("ignore")
def test_quantised_models_are_refused():
    for model in (Quantised(), nn.DataParallel(Quantised())):
        with pytest.raises(UnsupportedModelError, match=r"quantised \('body.fc'\); pass the float model"):
            heat(model, images())
    found = RISE(Quantised(), n_masks=4).attribute(images(), 1)  # asks for scores only
    assert found.any()


@needs_int8
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_integers_throughout_are_refused_by_all_that_look_at_layers(method):
    model, inputs = of_integers(), images()
    with pytest.raises(UnsupportedModelError, match=r"is quantised \('\d'\); pass the float .*RISE, which looks at no"):
        METHODS[method](model, inputs)
    assert RISE(model, n_masks=4).attribute(inputs, 1).any()


@needs_int8
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [resnet, vit])
def test_integer_linear_layers_train_no_explainer(build):
    """torch gives no error: without the model's own gradient only the regularisers would be trained."""
    with pytest.raises(UnsupportedModelError, match=r"must have gradients, but it is quantised .*ScoreCAM\(model, lay"):
        fitted(Quantised(build()), images(2, 32))


@needs_int8
@pytest.mark.filterwarnings("ignore")
def test_integer_linear_layers_have_maps_to_mask_with():
    inputs, name = images(2, 32), "blocks.1"
    found = ScoreCAM(Quantised(vit()), f"body.{name}").attribute(inputs, 1)
    expected = ScoreCAM(vit(), name).attribute(inputs, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * float(expected.max()))
    assert [t.name for t in TTAME(Quantised(vit()), recipe="paper").taps(inputs)] == [
        f"body.blocks.{i}" for i in range(3)
    ]


@needs_int8
@pytest.mark.filterwarnings("ignore")
def test_what_is_prepared_for_integers_is_a_float_model():
    from torchvision.models.quantization import shufflenet_v2_x0_5

    assert heat(of_integers(convert=False), images()).any()
    model = shufflenet_v2_x0_5(weights=None, num_classes=5).eval()  # its sums and concatenations are stand-ins
    assert heat(model, images(1), relu=False).any()


# weights in int8, everything else in float: nothing of torch's, so as other libraries do it


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1)) / 127
    return (weight / scale).round().to(torch.int8), scale


class Linear8(nn.Module):
    """A linear layer whose weight is a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("qweight", weight)
        self.register_buffer("scale", scale.flatten())
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype)) * self.scale + self.bias


class Weight8(Tensor):
    """A tensor that looks like float and is int8 inside."""

    @staticmethod
    def __new__(cls, weight: Tensor, scale: Tensor) -> Weight8:
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=scale.dtype, device=weight.device)

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.weight, self.scale = weight, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["weight", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value.weight.to(value.scale.dtype) * value.scale if isinstance(value, cls) else value

        if function.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten._to_copy):
            return cls(args[0].weight, args[0].scale)  # stays what it is, as those of other libraries do
        if "linear" not in str(function) and "mm" not in str(function) and function is not torch.ops.aten.t.default:
            raise NotImplementedError(f"Weight8: {function}")
        return function(*map(plain, args), **(kwargs or {}))


class Dequantise(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.scale.dtype) * self.scale


def in_buffers(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear8(child))
    return model


def in_subclasses(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Weight8(*rounded(module.weight.detach())), requires_grad=False)
    return model


def parametrised(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            weight, scale = rounded(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
            nn.utils.parametrize.register_parametrization(module, "weight", Dequantise(scale), unsafe=True)
    return model


def in_float(model: nn.Module) -> nn.Module:
    """The same rounded weights, written back."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight, scale = rounded(module.weight.detach())
            module.weight = nn.Parameter(weight * scale)
    return model


@pytest.mark.parametrize("quantise", [in_buffers, in_subclasses, parametrised])
@pytest.mark.parametrize("method", METHODS)
def test_weights_in_integers_change_nothing(method, quantise):
    inputs = images(2, 32)
    model = quantise(vit())
    assert [tap.name for tap in TTAME(model, recipe="paper").taps(inputs)] == [f"blocks.{i}" for i in range(3)]
    torch.testing.assert_close(METHODS[method](model, inputs), METHODS[method](in_float(vit()), inputs))


# --- models whose gradient ends ---------------------------------------------------------------------------------------


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = resnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.detach()) + 0 * self.body.fc.bias


class NoGrad(Detached):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Foreign(Detached):
    """A kernel without a gradient beside a way that has one, so that the outputs have some gradient."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.quantize_per_tensor(torch.randn(5, 5), 0.1, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x)
        return scores + torch.ops.quantized.linear_dynamic(scores, self.packed)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Detached, "no gradient path from the images"),
        (NoGrad, "no gradient path from the images to the outputs of NoGrad; a no_grad block lies between"),
        pytest.param(Foreign, "the operator quantized::linear_dynamic has none", marks=needs_int8),
    ],
)
def test_a_model_without_a_gradient_trains_no_explainer(model, says):
    with pytest.raises((LayerError, UnsupportedModelError), match=says):
        fitted(model().eval(), images(2, 32))


def test_an_explainer_inside_a_compiled_function():
    """Its maps are made eagerly: compiled code fires no hooks, and torch forbids to switch it off from within."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    explainer, inputs = GradCAM(model, "1"), images(2, 32)
    expected = 2 * explainer.attribute(inputs, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where dynamo leaves the compiled part
        compiled = torch.compile(lambda x: 2 * explainer.attribute(x, 1), backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(inputs), expected)


def test_a_layer_of_one_cell_can_be_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    inputs = images(2, 32)
    found = GradCAM(model, "2", relu=False, upsample=False).attribute(inputs, 1)
    wanted = (model[:4](inputs) * model[4].weight[1]).sum(1).detach()
    torch.testing.assert_close(found.view(2), wanted)
