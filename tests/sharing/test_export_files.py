"""Programs in files say what ``attribute`` says, and what cannot be written says why and leaves nothing behind."""

from __future__ import annotations

import functools
import json
import os
import warnings

import engine_cases as cases
import export_cases as some
import pytest
import strategies as zoo
import torch
from torch import nn

from attrib_zoo import CAM, TTAME
from attrib_zoo.errors import DataError, NotFittedError, OptionError, UnsupportedModelError
from attrib_zoo.sharing import files

KINDS = ("pt2", "onnx")
TOLERANCES = {"pt2": 1e-6, "onnx": 1e-4}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _libraries(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("kind", "onnx") == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=f"{name} is not installed: pip install 'attrib_zoo[export]'")


@functools.lru_cache(maxsize=1)
def program(path, written):
    """A .pt2 file's module and what it says of itself, read once for all images of a test: that takes a second."""
    extra = {"attrib_zoo.json": ""}
    with warnings.catch_warnings():  # torch 2.6, of constants in a model's forward
        warnings.filterwarnings("ignore", ".*get_attr", UserWarning)
        module = torch.export.load(path, extra_files=extra).module()
    return module, json.loads(extra["attrib_zoo.json"])


def run(path, *inputs):
    """What a reader who has only the file gets: logits, map, class."""
    if path.suffix == ".pt2":
        return [x.detach() for x in program(path, path.stat().st_mtime_ns)[0](*inputs)]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["logits", "map", "class"]
    names = [entry.name for entry in session.get_inputs()]
    assert names == ["images", "target"][: len(inputs)]
    return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))]


def check(path, explainer, images, target=None):
    tolerance = TOLERANCES[path.suffix[1:]]
    logits, maps, classes = run(path, images, *([] if target is None else [target]))
    with torch.no_grad():
        wanted = explainer.model(images)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance * max(1, float(wanted.abs().max())))
    assert torch.equal(classes, wanted.argmax(1) if target is None else target)
    wanted = explainer.attribute(images, target)[:, :1]
    assert float((wanted.std((2, 3)) / wanted.abs().amax((2, 3))).min()) > 0.02, "a map that says something"
    torch.testing.assert_close(maps, wanted, rtol=0, atol=tolerance * max(1, float(wanted.abs().max())))


def facts(path):
    if path.suffix == ".pt2":
        return program(path, path.stat().st_mtime_ns)[1]
    import onnx

    (entry,) = [entry for entry in onnx.load(path).metadata_props if entry.key == "attrib_zoo"]
    return json.loads(entry.value)


# ---------------------------------------------------------------------- they agree


def the_axes_have_names(path, height, width):
    import onnx

    graph = onnx.load(path).graph

    def axes(value):
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    assert axes(graph.input[0]) == ["batch", 3, height, width]
    assert [axes(value) for value in graph.output] == [["batch", 5], ["batch", 1, height, width], ["batch"]]


ANY_SIZE = ("rows", "paper")
"""Those whose files are made for images of any size as well; that is what takes the time."""


def slow_where_little_is_new(name, kind):
    """Whether a file of this kind is made of the same parts as others that are tested all the time."""
    return [pytest.mark.slow] if kind == "onnx" and name in ("L-CAM-Img", "L-CAM-Fm", "CAM") else []


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(n, k, marks=slow_where_little_is_new(n, k)) for n in some.EXPLAINERS for k in KINDS],
)
def test_a_file_of_each_explainer(name, kind, tmp_path):
    explainer = some.EXPLAINERS[name]()
    path = explainer.export(tmp_path / f"model.{kind}", any_size=None if name in ANY_SIZE else False)
    for count in (3, 1):
        check(path, explainer, some.images(count))
    assert facts(path)["free_axes"] == (["batch", "height", "width"] if name in ANY_SIZE else ["batch"])
    if name in ANY_SIZE:
        check(path, explainer, zoo.normal(2, 3, 48, 40).float())
    if kind == "onnx":
        the_axes_have_names(path, *(("height", "width") if name in ANY_SIZE else (32, 32)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_position_means_are_for_all_sizes(kind, tmp_path):
    images = some.images(32)
    explainer = zoo.fit(TTAME(cases.vit(global_pool="token", dynamic_img_size=True), recipe="attended"), [images])
    path = explainer.export(tmp_path / f"model.{kind}", any_size=True)
    assert explainer.network_.places
    for size in ((32, 32), (48, 24)):
        check(path, explainer, zoo.normal(2, 3, *size).float())


@each_kind
def test_bytes_and_the_class_in(kind, tmp_path):
    explainer = some.rows()
    path = explainer.export(str(tmp_path / f"model.{kind}"), preprocess="uint8", with_target=True, any_size=False)
    photos = (zoo.normal(3, 3, 32, 32).sigmoid() * 255).to(torch.uint8)
    module = explainer.as_module(preprocess="uint8")
    for count, target in ((3, torch.tensor([3, 0, 4])), (1, torch.tensor([2]))):
        wanted = module(photos[:count], target)
        assert torch.equal(wanted[2], target)
        for one, other in zip(run(path, photos[:count], target), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@each_kind
def test_ranks_and_coarse_maps(kind, tmp_path):
    explainer = some.rows(scale="rank", upsample=False)
    path = explainer.export(tmp_path / f"model.{kind}", any_size=False)
    images = some.images(4)
    found, wanted = run(path, images)[1], explainer.attribute(images)
    assert found.shape == wanted.shape == (4, 1, 8, 8)
    off = (found - wanted).abs()
    assert float(off.max()) <= 1 / 63 + 1e-6  # neighbours may be swapped by rounding
    assert float(off.mean()) < 1e-3
    assert facts(path)["free_axes"] == ["batch"]


@each_kind
def test_what_a_file_knows_about_itself(kind, tmp_path):
    explainer = some.rows()
    path = explainer.export(tmp_path / f"model.{kind}", some.images(1), any_batch=False, any_size=False)
    check(path, explainer, some.images(1))
    with pytest.raises(Exception, match=r"(?i)shape|dimension|size"):
        run(path, some.images(2))
    told = facts(path)
    assert told == {
        "library": told["library"],
        "method": "TTAME",
        "model": "TinyCNN",
        "weights": explainer._fitted.backbone,
        "layers": ["stages.2"],
        "image": [3, 32, 32],
        "preprocess": None,
        "mean": list(explainer.model.default_cfg["mean"]),
        "std": list(explainer.model.default_cfg["std"]),
        "free_axes": [],
    }


def test_the_opset_asked_for(tmp_path):
    import onnx

    explainer = some.rows()
    path = explainer.export(tmp_path / "model.onnx", some.images(1), opset=20, **ONE)
    assert onnx.load(path).opset_import[0].version == 20
    check(path, explainer, some.images(1))


def zoo_of_models():
    import timm
    import torchvision.models as tv

    return {
        "ResNet-18": (lambda: tv.resnet18(), 128),
        "EfficientNet-Lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 128),
        "ConvNeXt-T": (lambda: tv.convnext_tiny(), 128),
        "ViT-Ti": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=112), 112),
        "DINOv2-S with registers": (
            lambda: timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=1000, img_size=112),
            112,
        ),
        "Swin-T": (lambda: tv.swin_t(), 128),
        "SqueezeNet": (lambda: tv.squeezenet1_1(), 128),
    }


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("name", zoo_of_models())
def test_real_architectures(name, kind, tmp_path):
    make, size = zoo_of_models()[name]
    torch.manual_seed(0)
    model = make().eval()
    explainer = TTAME(model, recipe="rows").fit([some.images(4, size)], max_steps=0, show_progress=False)
    path = explainer.export(tmp_path / f"model.{kind}")
    check(path, explainer, some.images(3, size, seed=6))
    free = facts(path)["free_axes"]
    assert "batch" in free
    if name == "EfficientNet-Lite0":  # it pads as TensorFlow does
        assert free == ["batch"]
    if name in ("ResNet-18", "SqueezeNet"):
        assert free == ["batch", "height", "width"]
        check(path, explainer, zoo.normal(1, 3, size + 32, size).float())


@pytest.mark.slow
def test_cam_of_a_resnet_with_a_thousand_classes(tmp_path):
    from torchvision.models import resnet18

    model = cases.lively(resnet18())
    explainer = CAM(model)
    for kind in KINDS:
        check(explainer.export(tmp_path / f"model.{kind}", some.images(2, 64)), explainer, some.images(3, 64))


@pytest.mark.slow
def test_with_a_compiler_inductor_says_the_same():
    explainer, images = some.rows(), some.images()
    module = explainer.as_module()
    compiled = torch.compile(module, fullgraph=True)
    try:
        found = compiled(images)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working compiler: {error}")
    torch.testing.assert_close(found[1], explainer.attribute(images)[:, :1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- they cannot be written


def refused(explainer, path, error, match, **options):
    """The error says so; the folder holds what it held."""
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()} if path.parent.is_dir() else {}
    with pytest.raises(error, match=match):
        explainer.export(path, **options)
    if path.parent.is_dir():
        assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


ONE = {"any_batch": False, "any_size": False}
"""Options of the file that is made the fastest."""


def test_not_fitted(tmp_path):
    refused(TTAME(some.cnn()), tmp_path / "m.onnx", NotFittedError, "must be trained for this model")


@pytest.mark.parametrize("name", ["model", "model.pt", "model.tflite"])
def test_another_ending(name, tmp_path):
    refused(some.rows(), tmp_path / name, OptionError, f"path: must end in .onnx or .pt2.*got .*{name}'")


@pytest.mark.parametrize("opset", [17, 11, 999, True, "18"])
def test_an_opset_that_there_is_not(opset, tmp_path):
    refused(
        some.rows(), tmp_path / "m.onnx", OptionError, f"opset: must be an integer from 18.*got {opset!r}", opset=opset
    )


def test_an_opset_beside_pt2(tmp_path):
    refused(
        some.rows(), tmp_path / "m.pt2", OptionError, r"opset: belongs to \.onnx files, got 18 for 'm.pt2'", opset=18
    )


def test_no_such_folder(tmp_path):
    refused(some.rows(), tmp_path / "no" / "m.pt2", DataError, "path: must be a file in a folder that exists")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(DataError, match=r"folder\.pt2 \(it is a folder\)"):
        some.rows().export(tmp_path / "folder.pt2")


@each_kind
def test_a_full_disk(kind, tmp_path, monkeypatch):
    explainer = some.rows()
    path = tmp_path / f"model.{kind}"
    path.write_bytes(b"the old one")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(explainer, path, DataError, r"No space left on device\); make the folder, make room", **ONE)


class Branching(nn.Module):
    """Looks at its images to decide what to do."""

    def __init__(self):
        super().__init__()
        self.inner = some.cnn()

    def forward(self, x):
        return self.inner(x) if x.mean() > 0.1 else self.inner(-x)


@each_kind
def test_control_flow_that_depends_on_the_data(kind, tmp_path):
    explainer = some.rows(Branching(), "inner.stages.2")
    words = r"must do the same for all images to become a program, but Branching decides by the values of a tensor"
    refused(explainer, tmp_path / f"m.{kind}", UnsupportedModelError, words)


class Unknown(nn.Module):
    """Has an operator that ONNX has not."""

    def __init__(self):
        super().__init__()
        self.inner = some.cnn()

    def forward(self, x):
        return self.inner(torch.special.i0e(x))


def test_an_operator_that_onnx_has_not(tmp_path):
    explainer = some.rows(Unknown(), "inner.stages.2")
    refused(
        explainer,
        tmp_path / "m.onnx",
        UnsupportedModelError,
        r"Unknown has others \(\w+\.\w*i0e\); export to \.pt2",
        **ONE,
    )
    check(explainer.export(tmp_path / "m.pt2", **ONE), explainer, some.images(1))


class Counting(nn.Module):
    """Writes the number of images down."""

    def __init__(self):
        super().__init__()
        self.inner = some.cnn()

    def forward(self, x):
        return self.inner(x) * torch.ones(len(x), 1)


def test_a_model_that_writes_the_number_of_images_down(tmp_path):
    explainer = some.rows(Counting(), "inner.stages.2")
    words = r"any_batch: must be False for Counting.*as len\(images\) does"
    refused(explainer, tmp_path / "m.pt2", UnsupportedModelError, words, any_size=False)
    check(explainer.export(tmp_path / "m.pt2", **ONE), explainer, some.images(1))


def test_a_model_of_one_size_told_to_take_any(tmp_path):
    refused(
        some.rows(some.vit()), tmp_path / "m.pt2", UnsupportedModelError, "any_size: must be left out", any_size=True
    )


def test_a_file_that_says_something_else(tmp_path, monkeypatch):
    explainer = some.rows()
    real = files._pt2

    def lying(*args):
        data, run = real(*args)
        return data, lambda inputs: [x.flip(0) for x in run(inputs)]

    monkeypatch.setattr(files, "_pt2", lying)
    refused(
        explainer,
        tmp_path / "m.pt2",
        UnsupportedModelError,
        "must say in the file what it says in torch",
        any_size=False,
    )


def test_a_file_that_torch_cannot_read_again(tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("Failed deserializing node Node(target='torch.ops.aten.promote_types.default', inputs=[\n")

    monkeypatch.setattr(torch.export, "load", broken)
    words = (
        r"torch \S+ can write to a .pt2 file and read again, .*\w+ \(aten.promote_types.default\); take a newer torch"
    )
    refused(some.rows(), tmp_path / "m.pt2", UnsupportedModelError, words)


def test_a_model_that_is_too_large_for_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_BYTES", 1000)
    refused(some.rows(), tmp_path / "m.onnx", UnsupportedModelError, "less than 2 GB of weights.*export to .pt2")


def test_without_the_packages(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(some.rows(), tmp_path / "m.onnx", OptionError, r"onnxscript is not installed.*attrib_zoo\[export\]")
