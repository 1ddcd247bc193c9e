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

from attrib_zoo import RISE, TTAME, GradCAM
from attrib_zoo.errors import UnsupportedModelError

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
    assert [tap.name for tap in TTAME(model).taps(inputs)] == ["model.layer1", "model.layer3", "model.layer4"]


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
    assert len(TTAME(model).taps(inputs)) == 3
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


def test_outputs_with_logits_are_refused_with_the_line_that_helps():
    model, inputs = ForImageClassification(resnet()).eval(), images()
    for explain in (lambda: heat(model, inputs), lambda: TTAME(model).fit([inputs], max_steps=1)):
        with pytest.raises(UnsupportedModelError) as caught:
            explain()
        assert "got ImageClassifierOutput" in str(caught.value)
    line = str(caught.value).partition("returns the scores alone: ")[2]
    names: dict[str, Any] = {"torch": torch}
    exec(line, names)
    torch.testing.assert_close(heat(names["Logits"](model), inputs), heat(resnet(), inputs))


# --- types ----------------------------------------------------------------------------------------------------------


def test_bf16():
    inputs = images()
    found = heat(resnet().to(torch.bfloat16), inputs.to(torch.bfloat16)).float()
    expected = heat(resnet(), inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_bf16_model_with_images_of_another_type():
    """torch's own words say which types meet."""
    with pytest.raises(RuntimeError, match=r"(?i)bfloat16"):
        heat(resnet().to(torch.bfloat16), images())


class Quantised(nn.Module):
    """Convolutions in float, the head in int8: what dynamic quantisation makes."""

    def __init__(self) -> None:
        super().__init__()
        body = resnet()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.body = torch.ao.quantization.quantize_dynamic(body, {nn.Linear}, dtype=torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.filterwarnings("ignore")
def test_quantised_models_are_refused():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised operators here")
    for model in (Quantised().eval(), nn.DataParallel(Quantised().eval())):
        with pytest.raises(UnsupportedModelError, match=r"quantised \('body.fc'\); pass the float model"):
            heat(model, images())
    found = RISE(Quantised().eval(), n_masks=4).attribute(images(), 1)  # asks for scores only
    assert found.any()
