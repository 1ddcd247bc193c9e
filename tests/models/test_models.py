"""Classifiers by name: their weights, preprocessing, class names, and what is said when something is wrong."""

from __future__ import annotations

import json
import pickle
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models as torchvision_models

from attrib_zoo.errors import DataError, OptionError, TargetError, UnsupportedModelError
from attrib_zoo.models import LoadedModel, load, read_class_names
from attrib_zoo.models.load import _seen
from attrib_zoo.models.sources import source_of

TORCHVISION, TIMM = "shufflenet_v2_x0_5", "test_resnet"


def fresh(name: str, **options: object) -> nn.Module:
    torch.manual_seed(3)
    if name == TIMM:
        return timm.create_model(name, **options).eval()
    return torchvision_models.get_model(name, **options).eval()


def saved(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return saved(fresh(TORCHVISION), tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture
def loaded(weights: Path) -> LoadedModel:
    return load(TORCHVISION, weights=weights)


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")


def photo(width: int = 300, height: int = 280, mode: str = "RGB") -> Image.Image:
    """Smooth colours, so that resampling changes little."""
    x, y = torch.meshgrid(torch.linspace(0, 1, width), torch.linspace(0, 1, height), indexing="xy")
    pixels = (255 * torch.stack([x, y, (x + y) / 2], 2)).to(torch.uint8).numpy()
    return Image.fromarray(pixels).convert(mode)


# ---------------------------------------------------------------------- weights from files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", [TORCHVISION, TIMM])
@pytest.mark.parametrize("classes", [1000, 7])
def test_the_model_of_the_file_with_the_files_classes(tmp_path, name: str, suffix: str, classes: int) -> None:
    model = fresh(name, num_classes=classes)
    found = load(name, weights=saved(model, tmp_path / f"w{suffix}"))
    images = torch.rand(2, 3, 64, 64)
    assert not found.model.training
    assert found.num_classes == classes
    torch.testing.assert_close(found.model(images), model(images))


def test_what_training_scripts_wrap_around_weights_is_taken_off(tmp_path) -> None:
    model = fresh(TORCHVISION, num_classes=4)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pt")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load(TORCHVISION, weights=tmp_path / "w.pt").model(images), model(images))


def test_a_file_of_another_architecture_is_refused_by_name(tmp_path, weights: Path) -> None:
    with pytest.raises(
        DataError, match=r"does not fit .*tensors missing 70 \(conv1.3.weight, conv1.4.weight, conv1.4.bias and 67"
    ):
        load(TIMM, weights=weights)
    state = fresh(TORCHVISION).state_dict()
    state["conv1.0.weight"] = torch.zeros(24, 3, 5, 5)
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = r"not in the model 1 \(extra\); of another shape 1 \(conv1.0.weight 24x3x5x5 for 24x3x3x3\)"
    with pytest.raises(DataError, match=message):
        load(TORCHVISION, weights=tmp_path / "w.safetensors")


def test_another_number_of_classes_than_asked_is_refused(weights: Path) -> None:
    with pytest.raises(DataError, match=r"of another shape 2 \(fc.weight 1000x1024 for 5x1024, fc.bias 1000 for 5"):
        load(TORCHVISION, weights=weights, num_classes=5)


class Custom:
    """Something that only code can load."""


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unreadable_files_are_named(tmp_path, weights: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(DataError, match=f"no file '.*w{suffix}'"):
        load(TORCHVISION, weights=path)
    saved(fresh(TORCHVISION), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=f"w{suffix}'.*(damaged|cut off)"):
        load(TORCHVISION, weights=path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"w{suffix}'.*(damaged|cut off)"):
        load(TORCHVISION, weights=path)


def test_files_of_objects_and_other_things_are_refused(tmp_path) -> None:
    path = tmp_path / "w.pth"
    torch.save(Custom(), path)
    with pytest.raises(DataError, match=r"Python objects.*for safety; .*torch.save\(model.state_dict\(\), path\)"):
        load(TORCHVISION, weights=path)
    path.write_bytes(pickle.dumps(Custom(), protocol=2))
    with pytest.raises(DataError, match=r"w.pth' is damaged, or holds Python objects"):
        load(TORCHVISION, weights=path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(DataError, match=r"must hold named tensors, got .* list"):
        load(TORCHVISION, weights=path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(DataError, match=r"must hold named tensors, got .* dict"):
        load(TORCHVISION, weights=path)


# ---------------------------------------------------------------------- pretrained weights


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [TORCHVISION, TIMM, "test_vit.r160_in1k"])
def test_without_a_network_pretrained_weights_fail_at_once_in_one_sentence(name: str, capfd) -> None:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load(name)
    assert time.monotonic() - start < 8
    message = str(caught.value)
    assert message.startswith(f"weights: cannot get the pretrained weights of {name} (")
    assert "Name or service not known" in message
    assert "--weights FILE" in message
    assert "\n" not in message
    assert capfd.readouterr().out == ""
    assert socket.getdefaulttimeout() is None


@pytest.mark.usefixtures("no_network")
def test_cached_weights_of_torchvision_need_no_network(tmp_path) -> None:
    model = fresh(TORCHVISION)
    file = torchvision_models.get_model_weights(TORCHVISION).DEFAULT.url.rpartition("/")[2]
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    saved(model, folder / file)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load(TORCHVISION).model(images), model(images))


@pytest.mark.usefixtures("no_network")
def test_cached_weights_of_timm_need_no_network(tmp_path) -> None:
    model = fresh(TIMM)
    repository = tmp_path / "hub" / ("models--" + model.pretrained_cfg["hf_hub_id"].replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    saved(model, repository / "snapshots" / "abc" / "model.safetensors")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load(TIMM).model(images), model(images))


@pytest.mark.parametrize("name", [TORCHVISION, TIMM])
def test_pretrained_weights_have_their_own_classes(name: str) -> None:
    with pytest.raises(OptionError, match="have 1000 classes, got 5"):
        load(name, num_classes=5)


# ---------------------------------------------------------------------- names of models


def test_unknown_names_are_answered_with_the_closest() -> None:
    with pytest.raises(OptionError, match="no model 'resnet-50' in torchvision or timm; closest: 'resnet50'"):
        load("resnet-50")
    with pytest.raises(OptionError, match=r"no model 'torchvision/test_resnet'"):
        load("torchvision/test_resnet")
    with pytest.raises(OptionError, match=r"'test_resnet.nosuch' names weights that timm does not know"):
        load("test_resnet.nosuch")


def test_torchvision_comes_first_and_timm_can_be_asked_for(tmp_path) -> None:
    first = saved(fresh("resnet18", num_classes=2), tmp_path / "a.pth")
    assert type(load("resnet18", weights=first).model).__module__.startswith("torchvision.")
    assert type(load("timm/resnet18", weights=first).model).__module__.startswith("timm.")
    assert type(load("resnet18.a1_in1k", weights=first).model).__module__.startswith("timm.")


def test_a_model_without_classes_is_refused(tmp_path) -> None:
    name = "resnet18.fb_swsl_ig1b_ft_in1k"
    features = timm.create_model(name, num_classes=0)
    with pytest.raises(DataError, match=r"tensors missing 2 \(fc.weight, fc.bias\)"):
        load(name, weights=saved(features, tmp_path / "w.pth"))
    name = "vit_small_patch14_dinov2"
    dino = timm.create_model(name, num_classes=0)
    with pytest.raises(UnsupportedModelError, match=f"{name} returns features and has no classes of its own"):
        load(name, weights=saved(dino, tmp_path / "d.pth"))


def test_devices_that_are_not_there_are_refused(weights: Path) -> None:
    with pytest.raises(OptionError, match=r"device: 'gpu7' cannot be used here .*; try 'cpu'"):
        load(TORCHVISION, weights=weights, device="gpu7")


# ---------------------------------------------------------------------- preprocessing


def test_preprocessing_is_the_models_own(tmp_path, loaded: LoadedModel) -> None:
    image = photo()
    want = torchvision_models.get_model_weights(TORCHVISION).DEFAULT.transforms()(image)
    torch.testing.assert_close(loaded.transform(image), want)
    assert loaded.input_size == (3, 224, 224)

    model = fresh(TIMM)
    found = load(TIMM, weights=saved(model, tmp_path / "w.pth"))
    config = timm.data.resolve_data_config({}, model=model)
    torch.testing.assert_close(found.transform(image), timm.data.create_transform(**config)(image))
    assert (found.mean, found.std, found.input_size) == (config["mean"], config["std"], config["input_size"])


@pytest.mark.parametrize("name", [TORCHVISION, TIMM])
def test_the_view_is_the_same_crop_enlarged(tmp_path, name: str) -> None:
    found = load(name, weights=saved(fresh(name), tmp_path / "w.pth"))
    image = photo(500, 320)
    seen = found.transform(image) * torch.tensor(found.std).view(3, 1, 1) + torch.tensor(found.mean).view(3, 1, 1)
    view = found.view(image)
    factor = view.shape[-1] // seen.shape[-1]
    assert factor > 1
    assert view.shape[-1] == factor * seen.shape[-1]
    assert 0 <= view.min() < view.max() <= 1
    shrunk = nn.functional.avg_pool2d(view, factor)
    assert (shrunk - seen).abs().max() < 0.012  # a shift by two pixels would be 0.02


@pytest.mark.parametrize("size", [(500, 320), (320, 500), (90, 70), (3000, 2000)])
def test_the_crop_that_the_model_sees_is_found(tmp_path, size: tuple[int, int]) -> None:
    """torchvision resizes the shorter side to 256 and keeps 224 x 224 in the middle."""
    found = load(TORCHVISION, weights=saved(fresh(TORCHVISION), tmp_path / "w.pth"))
    half = min(size) * 224 / 256 / 2
    want = [size[0] / 2 - half, size[1] / 2 - half, size[0] / 2 + half, size[1] / 2 + half]
    assert found.seen(Image.new("RGB", size)) == pytest.approx(want, abs=max(1, 0.004 * max(size)))


def test_a_crop_that_pads_reaches_beyond_the_photograph() -> None:
    def squeezed(image: Image.Image) -> torch.Tensor:  # to 40 x 20, in the middle of 48 x 48
        pixels = torch.zeros(3, 48, 48)
        small = np.asarray(image.resize((40, 20))) / 255
        pixels[:, 14:34, 4:44] = torch.from_numpy(small).permute(2, 0, 1)
        return pixels

    assert _seen(squeezed, (400, 200)) == pytest.approx((-40, -140, 440, 340), abs=3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_are_taken(loaded: LoadedModel, mode: str) -> None:
    image = photo(mode=mode)
    torch.testing.assert_close(loaded.transform(image), loaded.transform(image.convert("RGB")))


def test_the_transform_can_be_sent_to_other_processes(loaded: LoadedModel) -> None:
    again = pickle.loads(pickle.dumps(loaded.transform))
    assert torch.equal(again(photo()), loaded.transform(photo()))


# ---------------------------------------------------------------------- class names


def test_imagenet_names_come_with_imagenet_models(tmp_path, loaded: LoadedModel) -> None:
    found = load(TIMM, weights=saved(fresh(TIMM), tmp_path / "w.pth"))
    for names in (loaded.class_names, found.class_names):
        assert names is not None
        assert (names[0], names[1], names[388], len(names)) == ("tench", "goldfish", names[388], 1000)
        assert "panda" in names[388]


def test_other_models_have_the_names_that_are_given(tmp_path) -> None:
    for name in (TORCHVISION, TIMM):
        path = saved(fresh(name, num_classes=3), tmp_path / f"{name}.pth")
        assert load(name, weights=path).class_names is None
        assert load(name, weights=path).class_name(2) == "class 2"
        assert load(name, weights=path, class_names=["a", "b", "c"]).class_name(2) == "c"
        with pytest.raises(OptionError, match="class_names: must be one per class, got 2 names for 3 classes"):
            load(name, weights=path, class_names=["a", "b"])


def test_classes_are_found_by_index_or_name(loaded: LoadedModel) -> None:
    assert loaded.class_index("7") == 7
    assert loaded.class_index("Goldfish") == 1
    with pytest.raises(TargetError, match="1000 classes, got 1000; give an index from 0 to 999"):
        loaded.class_index("1000")
    with pytest.raises(TargetError, match="1000 classes, got -1"):
        loaded.class_index("-1")
    with pytest.raises(TargetError, match="no class is called 'goldfsh'; closest: 'goldfish'"):
        loaded.class_index("goldfsh")
    twice = replace(loaded, class_names=("crane", "tench", "crane"), num_classes=3)
    with pytest.raises(TargetError, match="'crane' is the name of the classes 0, 2; give the index"):
        twice.class_index("crane")
    assert replace(loaded, class_names=None).class_index("999") == 999
    cased = replace(loaded, class_names=("Hen", "hen", "COCK"), num_classes=3)
    assert [cased.class_index(name) for name in ("Hen", "hen", "cock")] == [0, 1, 2]
    with pytest.raises(TargetError, match="'HEN' is the name of the classes 0, 1"):
        cased.class_index("HEN")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_files_of_windows_editors(tmp_path, encoding) -> None:
    path = tmp_path / "names.txt"
    path.write_text("hen\nпетух\n", encoding=encoding)
    assert read_class_names(path) == ["hen", "петух"]


def test_class_files_in_another_encoding_say_so(tmp_path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("hen\nпетух\n", encoding="cp1251")
    with pytest.raises(DataError, match=r"names.txt' must be text in UTF-8, but it is not"):
        read_class_names(path)


def test_a_trainer_s_name_before_all_weights_is_taken_off(tmp_path) -> None:
    """Lightning holds the model under the name that the user gave it, beside losses and metrics."""
    model = fresh(TIMM, num_classes=4)
    state = {f"net.{key}": value for key, value in model.state_dict().items()} | {"loss.weight": torch.ones(4)}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": []}, tmp_path / "last.ckpt")
    found = load(TIMM, weights=tmp_path / "last.ckpt").model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_a_name_of_several_parts_is_taken_off_and_two_models_are_told_apart(tmp_path) -> None:
    state = fresh(TIMM, num_classes=4).state_dict()
    nested = {f"net.backbone.{key}": value for key, value in state.items()} | {"net.loss": torch.ones(1)}
    torch.save(nested, tmp_path / "nested.pt")
    found = load(TIMM, weights=tmp_path / "nested.pt").model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items())
    torch.save(
        {f"{name}.{key}": value for name in ("model", "ema.net") for key, value in state.items()}, tmp_path / "2.pt"
    )
    with pytest.raises(DataError, match=r"holds the model's tensors 2 times, under 'model\.' and 'ema\.net\.'; save"):
        load(TIMM, weights=tmp_path / "2.pt")


def test_names_that_happen_to_be_alike_are_no_model(tmp_path) -> None:
    torch.save({f"{name}.fc.weight": torch.zeros(4, 2) for name in ("a", "b")}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"does not fit the model.*another architecture"):
        load(TIMM, weights=tmp_path / "w.pt")


def test_an_address_is_no_file() -> None:
    with pytest.raises(DataError, match=r"'https://x\.org/w\.pt' is an address; nothing is downloaded from there"):
        load(TIMM, weights="https://x.org/w.pt")


def test_an_exported_program_is_named(tmp_path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), str(tmp_path / "m.pt2"))
    with pytest.raises(
        DataError, match=r"is an exported program.*torch.save\(torch.export.load\(path\).state_dict, oth"
    ):
        load(TIMM, weights=tmp_path / "m.pt2")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "m.pt"))
    with pytest.raises(DataError, match=r"is a TorchScript archive.*torch.jit.load\(path\).state_dict\(\)"):
        load(TIMM, weights=tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["test_resnet", "squeezenet1_1"])
def test_models_of_grey_images_see_the_grey_of_photographs(tmp_path, name: str) -> None:
    source = source_of(name)
    model = source.build(4, channels=1)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    loaded = load(name, weights=tmp_path / "grey.pth")
    assert loaded.num_classes == 4
    assert loaded.input_size[0] == 1
    assert (loaded.mean, loaded.std) == ((0.5,), (0.5,))
    grey = loaded.transform(Image.new("RGB", (300, 300), (200, 100, 50)))
    assert grey.shape == loaded.input_size
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    torch.testing.assert_close(grey, torch.full(loaded.input_size, (luma - 0.5) / 0.5), atol=1e-2, rtol=0)
    assert loaded.view(Image.new("L", (300, 300), 9)).shape[0] == 3
    with torch.no_grad():
        assert torch.equal(loaded.model(grey[None]), model.eval()(grey[None]))
    torch.save(source.build(4, channels=13).state_dict(), tmp_path / "many.pth")
    with pytest.raises(UnsupportedModelError, match=r"photographs, with 3 bands or 1, got weights for images of 13"):
        load(name, weights=tmp_path / "many.pth")


DIGITS = ("0", "1", "10", "11", "2")  # a folder of digits in alphabetical order


def test_numbers_for_names_are_never_mixed_up_with_indices(loaded: LoadedModel) -> None:
    digits = replace(loaded, class_names=DIGITS, num_classes=5)
    assert [digits.class_index(t) for t in ("0", "1", "10", "11")] == [0, 1, 2, 3]  # one meaning each
    assert [digits.class_index(f"#{i}") for i in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(TargetError, match=r"'2' may be an index or a name.*index 2 is the class '10', and .* index 4;"):
        digits.class_index("2")
    with pytest.raises(TargetError, match=r"'3' may be an index or a name.*index 3 is the class '11'; give '#3'"):
        digits.class_index("3")
    with pytest.raises(TargetError, match="5 classes, got #5"):
        digits.class_index("#5")
    with pytest.raises(TargetError, match="5 classes, got 7"):
        digits.class_index("7")
    mixed = replace(loaded, class_names=("cat", "10", "dog"), num_classes=3)
    assert [mixed.class_index(t) for t in ("0", "10", "2")] == [0, 1, 2]
    with pytest.raises(TargetError, match=r"'1' may be an index or a name.*index 1 is the class '10'"):
        mixed.class_index("1")
    with pytest.raises(TargetError, match="no class is called '²'"):
        mixed.class_index("²")  # a digit to some functions, and no number


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(["cat", "dög"])),
        ("a.json", json.dumps({"1": "dög", "0": "cat"})),
        ("a.json", json.dumps({"0": ["n01", "cat"], "1": ["n02", "dög"]})),
        ("a.txt", "cat\r\n dög \n\n"),
        ("a.txt", "\ufeffcat\ndög\n"),
        ("a.json", "\ufeff" + json.dumps(["cat", "dög"])),
    ],
)
def test_class_files_of_every_form(tmp_path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_class_names(tmp_path / name) == ["cat", "dög"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", r"cannot read '.*a.json' \(.*\); it must be a JSON list"),
        ("{}", "holds no class names"),
        ("[1, 2]", "holds no class names"),
        ("3", "holds no class names"),
        (json.dumps({"0": "a", "2": "b"}), "has no entry '1'"),
        (json.dumps({"n01": "a"}), "has no entry '0'"),
    ],
)
def test_class_files_that_are_none(tmp_path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_names(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"classes: cannot read .*No such file"):
        read_class_names(tmp_path / "nowhere.txt")
