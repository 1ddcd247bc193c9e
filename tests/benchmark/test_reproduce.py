"""The papers' protocols, run whole on tiny folders of the data sets' own formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn

from attrib_zoo import metrics, synthetic
from attrib_zoo.benchmark import protocols
from attrib_zoo.benchmark.protocols import Backbone, Plan, backbones, lcam, papers, sise, ttame
from attrib_zoo.benchmark.protocols.datasets import (
    VOC_CLASSES,
    VOCRegions,
    imagenet_training,
    imagenet_validation,
    voc2007,
)
from attrib_zoo.benchmark.protocols.plan import measure, slug, wanted
from attrib_zoo.benchmark.protocols.splits import choose, draw, read_list, write_list
from attrib_zoo.benchmark.protocols.voc_head import fit_logistic
from attrib_zoo.cli import main
from attrib_zoo.errors import DataError, OptionError, UnsupportedModelError
from attrib_zoo.metrics._regions import box_masks
from attrib_zoo.synthetic.networks import seeded
from attrib_zoo.training import checkpoint
from attrib_zoo.training.recipe import as_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # two steps train nothing, and fit says so
WNIDS = ("n01440764", "n01443537", "n02099601")
BUDGET = {"n_masks": 4, "max_iter": 2, "step": 8, "sigma": 8.0, "blur": 4.0, "ig_steps": 2}


class TinyVGG(nn.Module):
    """Convolutions and poolings as VGG has them, the last layers a pooling and a linear one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        pairs = [(3, 4), (4, 6), (6, 8)]
        layers = [(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)) for i, o in pairs]
        self.features = nn.Sequential(*(layer for block in layers for layer in block))
        self.classifier = nn.Sequential(nn.Linear(8, classes))

    def forward(self, inputs):
        return self.classifier(self.features(inputs).mean((2, 3)))


def tiny(name: str, classes: int = 3) -> Backbone:
    """A model of the same kind as the backbone of that name, for 32 px images."""
    more = {"resize": 36, "size": 32, "budget": BUDGET}
    with seeded(0):
        if name == "vgg16":
            layers = {"cam": "features.7", "lcam": "features.7", "pooled": "features.8"}
            attention = ("features.2", "features.5", "features.8")
            return Backbone(name, TinyVGG(classes).eval(), attention=attention, **layers, **more)
        make = synthetic.tiny_vit if name == "vit_b_16" else synthetic.tiny_cnn
        size = {"dim": 8, "depth": 3} if name == "vit_b_16" else {"width": 4}
        more |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "transformer": name == "vit_b_16"}
        return Backbone(name, make(classes, **size), **more)


def picture(path: Path, seed: int, size: tuple[int, int] = (44, 38)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def val_name(i: int) -> str:
    return f"ILSVRC2012_val_{i + 1:08d}"


LABELS = [2, 0, 1, 0, 2, 1]


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """Six validation images and four training images in class folders."""
    root = tmp_path / "imagenet"
    for i, label in enumerate(LABELS):
        picture(root / "val" / WNIDS[label] / f"{val_name(i)}.JPEG", i)
    for i in range(4):
        picture(root / "train" / WNIDS[i % 3] / f"{WNIDS[i % 3]}_{i}.JPEG", 100 + i)
    return root


@pytest.fixture
def flat(imagenet) -> Path:
    """The same validation images in one folder, with the development kit, whose numbers are in another order."""
    root = imagenet.parent / "flat"
    (root / "val").mkdir(parents=True)
    for path in (imagenet / "val").rglob("*.JPEG"):
        shutil.copy(path, root / "val" / path.name)
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    numbers = {WNIDS[0]: 2, WNIDS[1]: 3, WNIDS[2]: 1, "n00000001": 4}
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    synsets = np.array(
        [(n, w, float(w == "n00000001")) for w, n in sorted(numbers.items(), key=lambda entry: entry[1])], dtype=kinds
    )
    savemat(kit / "meta.mat", {"synsets": synsets})
    truth = "".join(f"{numbers[WNIDS[label]]}\n" for label in LABELS)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    return root


OBJECTS = (
    [("dog", (5, 9, 20, 30), 0), ("dog", (30, 2, 40, 12), 1), ("person", (22, 4, 28, 36), 0)],
    [("cat", (1, 1, 44, 38), 0), ("sofa", (3, 3, 9, 9), 1)],
    [("car", (11, 8, 33, 30), 0)],
)


def annotation(name: str, objects, size: tuple[int, int] = (44, 38)) -> str:
    parts = [
        f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for kind, (x1, y1, x2, y2), hard in objects
    ]
    told = f"<width>{size[0]}</width><height>{size[1]}</height><depth>3</depth>"
    return f"<annotation><filename>{name}.jpg</filename><size>{told}</size>{''.join(parts)}</annotation>"


@pytest.fixture
def voc(tmp_path) -> Path:
    """VOC 2007 of three test and three trainval images."""
    base = tmp_path / "voc" / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    for name, first in (("test", 1), ("trainval", 11)):
        names = [f"{first + i:06d}" for i in range(len(OBJECTS))]
        (base / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{n}\n" for n in names))
        for i, (n, objects) in enumerate(zip(names, OBJECTS, strict=True)):
            picture(base / "JPEGImages" / f"{n}.jpg", first + i)
            (base / "Annotations" / f"{n}.xml").write_text(annotation(n, objects))
    return tmp_path / "voc"


def plan(data: Path, **more) -> Plan:
    small = {"test_images": 2, "val_images": 2, "max_steps": 2, "fit_batch_size": 2, "batch_size": 2}
    return Plan(**{"data": data, "output": data.parent / "out", "progress": False, **small, **more})


# ---------------------------------------------------------------------- what the papers print


def table(paper: str, backbone: str, name: str) -> papers.Printed:
    (found,) = (t for t in papers.printed(paper, backbone) if t.table == name)
    return found


@pytest.mark.parametrize("backbone", ["vgg16", "resnet50"])
def test_the_two_papers_agree_where_they_print_the_same_rows(backbone):
    ours, theirs = table("ttame", backbone, "Table 2"), table("lcam", backbone, "Table 1")
    for method in ("Grad-CAM", "Grad-CAM++", "Score-CAM", "RISE"):
        assert ours.rows[method] == theirs.rows[method]
    name = "L-CAM-Img†" if backbone == "vgg16" else "L-CAM-Img"
    differ = [m for m, a, b in zip(ours.measures, ours.rows["L-CAM-Img"], theirs.rows[name], strict=True) if a != b]
    assert differ == (["IC(100)"] if backbone == "vgg16" else [])


@pytest.mark.parametrize(("backbone", "name"), [("vgg16", "Table 2"), ("resnet50", "Table 2"), ("vit_b_16", "Table 3")])
def test_the_ablations_begin_with_the_proposed_method(backbone, name):
    rows = table("ttame", backbone, "Table 6").rows
    assert rows["T-TAME"] == table("ttame", backbone, name).rows["T-TAME"]


def test_every_row_has_a_number_for_every_measure():
    for printed in papers.TABLES:
        assert all(len(row) == len(printed.measures) for row in printed.rows.values())
        assert all(0 < x < 100 for row in printed.rows.values() for x in row)
        assert set(printed.passes) <= set(printed.rows)
    row = dict(zip(papers.LOCALIZATION + papers.DROP, table("sise", "resnet50", "Table 1").rows["SISE"], strict=True))
    assert row == {"EBPG": 66.08, "mIoU": 31.37, "Bbox": 61.59, "Drop%": 30.92, "Increase%": 40.22}


@pytest.mark.parametrize("name", backbones.NAMES)
def test_the_layers_that_the_papers_read_exist(name):
    from torchvision.models import get_model

    facts = backbones._FACTS[name]
    with torch.device("meta"):
        model = get_model(name, weights=None)
    for layer in (facts["cam"], facts.get("lcam"), facts.get("pooled"), *facts["attention"]):
        assert layer is None or isinstance(model.get_submodule(layer), nn.Module)
    if name == "vgg16":
        assert all(isinstance(model.get_submodule(layer), nn.MaxPool2d) for layer in facts["attention"])
        assert isinstance(model.get_submodule(facts["lcam"]), nn.ReLU)
    last = {"vgg16": "classifier.6", "resnet50": "fc", "vit_b_16": "heads.head"}
    assert backbones.last_linear(model)[0] == last[name]


def test_images_are_cut_as_the_papers_say():
    """Shorter side 36, crop 32: nothing is resized of a 60x36 picture; the centre for tests, any place in training."""
    backbone = tiny("resnet50")
    pixels = np.random.default_rng(0).integers(0, 256, (36, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    full = torch.from_numpy(pixels).permute(2, 0, 1).double() / 255 / 0.25 - 2
    assert torch.allclose(backbone.for_test()(image).double(), full[:, 2:34, 14:46], atol=1e-6)
    windows = full.unfold(1, 32, 1).unfold(2, 32, 1)
    places = set()
    for _ in range(4):
        crop = backbone.for_training()(image).double()
        gaps = (windows - crop[:, None, None]).abs().amax((0, 3, 4))
        assert gaps.min() < 1e-5
        places.add(int(gaps.argmin()))
    assert len(places) > 1
    small = np.asarray(image.resize((90, 54)).resize((60, 36), Image.Resampling.BILINEAR))[2:34, 14:46]
    seen = ((backbone.for_test()(image.resize((90, 54))).permute(1, 2, 0).double() + 2) * 0.25 * 255).round().numpy()
    assert (seen == small).all()
    squeezed = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    seen = ((backbone.whole()(image).permute(1, 2, 0).double() + 2) * 0.25 * 255).round().numpy()
    assert (seen == squeezed).all()


# ---------------------------------------------------------------------- splits


def test_a_split_depends_on_names_and_seed_alone():
    names = [f"image{i}" for i in range(30)]
    first = draw(names, 5, 7)
    assert len({*first.validation, *first.test}) == 12
    assert draw(names, 5, 7) == first != draw(names, 5, 7, seed=1)
    whole = draw(names, 14, 16)
    assert sorted([*whole.validation, *whole.test]) == list(range(30))
    turned = draw(names[::-1], 5, 7)
    assert [names[::-1][i] for i in turned.test] == [names[i] for i in first.test]
    more = draw(names, 5, 20)
    assert more.test[:7] == first.test
    assert more.validation == first.validation


def test_lists_name_the_images(tmp_path):
    names = [f"image{i}" for i in range(9)]
    asked = tmp_path / "test.txt"
    asked.write_text("val/n01/image4.JPEG 3\n\nimage2\n")
    found = choose(names, 6, 99, test_list=asked)
    assert found.test == [4, 2]
    assert len(found.validation) == 6
    assert not {2, 4} & set(found.validation)
    assert read_list(asked) == {"image4": 3, "image2": None}
    watched = tmp_path / "val.txt"
    write_list(watched, ["image0"], [7])
    assert choose(names, test=3, val_list=watched).validation == [0]
    with pytest.raises(OptionError, match="one for each of 1 names"):
        write_list(watched, ["image0"], [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image1\nimage1.png 3", "names image1 twice"),
        ("image1 cat", "holds the line 'image1 cat'"),
        ("a b c", "holds the line"),
        ("\n", "is empty"),
        ("image1\nimage77", r"1 images that are not in the data \(image77\)"),
        (None, "cannot read"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, said):
    file = tmp_path / "list.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=said):
        choose([f"image{i}" for i in range(9)], 1, 1, test_list=file)


def test_sets_that_overlap_or_are_too_large(tmp_path):
    names = [f"image{i}" for i in range(9)]
    (tmp_path / "a").write_text("image1\nimage2")
    (tmp_path / "b").write_text("image2")
    with pytest.raises(DataError, match=r"1 in both lists \(image2\)"):
        choose(names, val_list=tmp_path / "a", test_list=tmp_path / "b")
    with pytest.raises(DataError, match="are 10, got 9"):
        draw(names, 5, 5)


# ---------------------------------------------------------------------- the data as it lies on disk


def test_class_folders_and_the_devkit_say_the_same(imagenet, flat):
    folders, kit = imagenet_validation(imagenet), imagenet_validation(flat)
    assert folders.names == kit.names == [val_name(i) for i in range(6)]
    assert folders.labels == kit.labels == LABELS
    assert folders.num_classes == kit.num_classes == 3
    assert imagenet_validation(imagenet / "val").labels == LABELS
    shutil.rmtree(flat / "ILSVRC2012_devkit_t12")
    assert imagenet_validation(flat).labels is None


def test_labels_from_a_list(flat, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"{val_name(i)}.JPEG {label + 5}\n" for i, label in enumerate(LABELS)))
    assert imagenet_validation(flat, file).labels == [label + 5 for label in LABELS]
    file.write_text(f"{val_name(0)} 1")
    with pytest.raises(DataError, match="no label for 5 images"):
        imagenet_validation(flat, file)


def test_what_is_missing_of_imagenet_is_said(imagenet, flat, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"is no folder. What is expected is ImageNet[\s\S]*FOLDER/val/n01440764"):
        imagenet_validation(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no folder 'train', and explainers must be trained"):
        imagenet_training(flat)
    assert len(imagenet_training(imagenet)) == 4
    shutil.rmtree(imagenet / "val")
    with pytest.raises(DataError, match="holds no validation images"):
        imagenet_validation(imagenet)
    kit = flat / "ILSVRC2012_devkit_t12" / "data"
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(DataError, match="pip install scipy"):
        imagenet_validation(flat)
    monkeypatch.undo()
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n3\n1\n2\n9\n")
    with pytest.raises(DataError, match=r"meta.mat does not know: 9"):
        imagenet_validation(flat)
    truth.write_text("1\n2\n")
    with pytest.raises(DataError, match="2 labels for 6 images"):
        imagenet_validation(flat)
    truth.write_text("1\n" * 6)
    (kit / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"cannot read '.*meta.mat'"):
        imagenet_validation(flat)


def test_names_must_be_unique(imagenet):
    picture(imagenet / "val" / WNIDS[0] / f"{val_name(0)}.JPEG", 9)
    with pytest.raises(DataError, match=f"{val_name(0)} more than once"):
        imagenet_validation(imagenet)


def test_voc_annotations_are_read(voc):
    images = voc2007(voc)
    dog, person = VOC_CLASSES.index("dog"), VOC_CLASSES.index("person")
    assert images[0].boxes[dog] == [(4, 8, 20, 30), (29, 1, 40, 12)]
    assert images[0].asked == sorted([dog, person])
    assert images[1].asked == [VOC_CLASSES.index("cat")]  # the sofa is marked difficult
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert [i.path for i in voc2007(voc / "VOCdevkit")] == [i.path for i in images]


def test_boxes_lie_where_the_object_is(voc):
    """The object is painted white on black at the pixels that the annotation counts from 1, both ends included."""
    pixels = np.zeros((38, 44, 3), np.uint8)
    pixels[7:30, 10:33] = 255
    Image.fromarray(pixels).save(voc / "VOCdevkit/VOC2007/JPEGImages/000003.jpg", quality=100, subsampling=0)
    pairs = VOCRegions(voc2007(voc), Backbone("vgg16", nn.Identity(), size=88).whole())
    assert len(pairs) == 4
    assert pairs[0]["boxes"].shape == (2, 4)
    item = pairs[3]
    seen = item["image"].mean(0) > 0
    inside = box_masks(item["boxes"][None], seen.shape)[0, 0]
    assert (seen == inside).double().mean() > 0.99
    assert int(item["target"]) == VOC_CLASSES.index("car")


def test_what_is_missing_of_voc_is_said(voc, tmp_path):
    with pytest.raises(DataError, match=r"holds no VOCdevkit/VOC2007. What is expected is PASCAL VOC 2007"):
        voc2007(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no image set 'val'"):
        voc2007(voc, "val")
    base = voc / "VOCdevkit/VOC2007"
    (base / "Annotations/000001.xml").write_text("<annotation><size/></annotation>")
    with pytest.raises(DataError, match=r"'.*000001.xml' is no annotation of VOC"):
        voc2007(voc)
    (base / "JPEGImages/000001.jpg").unlink()
    with pytest.raises(DataError, match=r"no file '.*000001.jpg'"):
        voc2007(voc)
    (base / "ImageSets/Main/test.txt").write_text("")
    with pytest.raises(DataError, match="empty image set"):
        voc2007(voc)


# ---------------------------------------------------------------------- whole runs


def trained(asked: Plan) -> dict[str, dict]:
    """What the saved explainers say of themselves: their layers and options."""
    files = sorted((asked.output / "explainers").iterdir())
    facts = {file.stem: checkpoint.read(file).facts for file in files}
    return {name: {"layers": [layer for layer, _ in f["layers"]], **f["options"]} for name, f in facts.items()}


def settings(found: protocols.Comparison) -> dict[str, str]:
    return found.tables[0].records.setting["methods"]


@pytest.mark.parametrize("name", ["vgg16", "vit_b_16"])
def test_ttame(imagenet, name):
    asked = plan(imagenet)
    found = ttame.run(asked, tiny(name))
    main_table = "Table 2" if name == "vgg16" else "Table 3"
    (first,) = (p for p in found.printed if p.table == main_table)
    assert [line.method for line in found.lines(first)] == list(first.rows)
    assert all(n == 2 for p in found.printed for line in found.lines(p) for _, _, n in line.ours)
    text = found.to_text()
    assert f"{first.rows['T-TAME'][0]:.2f}" in text
    assert "top-1 accuracy" in text
    numbers = json.loads((asked.output / "comparison.json").read_text())
    assert numbers["tables"][0]["methods"]["RISE"]["forward"]["ours"] == 5  # one to decide, four masks
    lines = (asked.output / "comparison.md").read_text().splitlines()
    assert sum(line.startswith("| T-TAME") for line in lines) == len(found.printed)
    assert "image edges" in (asked.output / "table.csv").read_text()
    assert "variant='pytorch-grad-cam'" in settings(found)["Score-CAM"]
    assert "alpha='local'" in settings(found)["Grad-CAM++"]
    assert "Table 6" not in {table.table for table in found.printed}


def test_the_variants_of_table_6(imagenet):
    asked = plan(imagenet, ablations=True, methods=papers.VARIANTS)
    found = ttame.run(asked, tiny("vgg16"))
    (printed,) = (p for p in found.printed if p.table == "Table 6")
    assert [line.method for line in found.lines(printed)] == list(papers.VARIANTS)
    facts = trained(asked)
    poolings = ["features.2", "features.5", "features.8"]
    assert facts["t-tame"]["layers"] == facts["no-skip-connection"]["layers"] == poolings
    assert facts["fms-from-two-layers"]["layers"] == poolings[1:]
    assert facts["fms-from-one-layer"]["layers"] == poolings[2:]
    recipes = {name: as_recipe(fact["recipe"]) for name, fact in facts.items()}
    kinds = {name: (r.skip, r.batch_norm, r.branch_activation) for name, r in recipes.items()}
    assert kinds["t-tame"] == kinds["fms-from-one-layer"] == (True, True, "relu")
    assert kinds["no-skip-connection"] == (False, True, "relu")
    assert kinds["no-skip-no-batch-norm"] == (False, False, "relu")
    assert kinds["sigmoid-in-feature-branch"] == (True, True, "sigmoid")


def test_lcam(imagenet):
    asked = plan(imagenet, recipe="released")
    found = lcam.run(asked, tiny("vgg16"))
    (printed,) = found.printed
    assert [line.method for line in found.lines(printed)] == list(printed.rows)
    facts = trained(asked)
    relu, pool = ["features.7"], ["features.8"]
    assert {name: (f["layers"], f["ce_only"]) for name, f in facts.items()} == {
        "l-cam-fm-star": (relu, True),
        "l-cam-fm": (relu, False),
        "l-cam-img-star": (relu, True),
        "l-cam-img": (relu, False),
        "l-cam-img-dagger": (pool, False),
    }
    assert {f["recipe"] for f in facts.values()} == {"released"}
    assert (asked.output / "test.txt").read_text().split()[0] in {val_name(i) for i in range(6)}


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_sise(voc, name):
    asked = plan(voc, test_images=None, head_steps=3)
    found = sise.run(asked, tiny(name), train_head=True)
    (printed,) = found.printed
    assert [line.method for line in found.lines(printed)] == list(printed.rows)
    regions, images = found.tables
    assert len(regions.images) == 4
    assert len(images.images) == 3
    assert {t.records.setting["score"] for t in found.tables} == {"sigmoid"}
    for method in ("RISE", "Score-CAM", "SISE"):
        assert "score='sigmoid'" in settings(found)[method]
    targets = [regions.records.rows["SISE", i].target for i in regions.images]
    assert targets == [VOC_CLASSES.index(c) for c in ("dog", "person", "cat", "car")]
    head = (asked.output / "head.safetensors").read_bytes()
    again = sise.run(asked, tiny(name), train_head=True)
    assert again.to_json() == found.to_json()
    assert (asked.output / "head.safetensors").read_bytes() == head


def test_energy_is_taken_as_it_is():
    """SISE's EBPG has no min-max: a map that is 1 everywhere, 3 in a quarter, has half of its energy there."""
    from attrib_zoo.benchmark.measures import Question

    maps = torch.ones(1, 1, 8, 8)
    maps[..., :4, :4] = 3
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    asked = Question(nn.Identity(), lambda *_: maps, torch.zeros(1, 3, 8, 8), maps, None, None, [0], {"boxes": boxes})
    assert float(sise.REGIONS[0].compute(asked)) == 0.5
    assert float(metrics.energy_pointing_game(None, asked.inputs, maps, None, boxes=boxes)) == 1


def test_vgg_has_a_learning_rate_of_its_own(imagenet):
    from attrib_zoo import LCAMImg
    from attrib_zoo.benchmark.protocols.plan import _schedule

    assert _schedule(lcam.VGG["paper"], 20_000) == lcam.VGG["paper"]
    assert _schedule(lcam.VGG["paper"], 19_999) == _schedule(None, 20_000) == "auto"
    asked = plan(imagenet, recipe="released", methods=("L-CAM-Img†",), max_steps=17, val_images=0)
    lcam.run(asked, tiny("vgg16"))
    explainer = LCAMImg.load(asked.output / "explainers" / "l-cam-img-dagger.safetensors", tiny("vgg16").model)
    rates = explainer.history_["lr"]
    assert explainer.schedule_ == "released"
    assert rates[:3] == [0.01] * 3  # 17 steps in 8 epochs: 3 steps each
    assert rates[15] == pytest.approx(0.01 * 0.75**5)
    file = asked.output / "explainers" / "l-cam-img-dagger.safetensors"
    before = file.read_bytes()
    file.unlink()
    lcam.run(asked, tiny("vgg16"))  # from the checkpoint, which knows the schedule
    assert file.read_bytes() == before


# ---------------------------------------------------------------------- continued runs


def test_a_second_run_continues(imagenet):
    """Explainers and results are read again; the training images are not needed any more."""
    asked = plan(imagenet, methods=("T-TAME",))
    first = ttame.run(asked, tiny("resnet50"))
    file = asked.output / "explainers" / "t-tame.safetensors"
    before, rows = file.read_bytes(), (asked.output / "results" / "t-tame.jsonl").read_bytes()
    shutil.rmtree(imagenet / "train")
    assert ttame.run(asked, tiny("resnet50")).to_json() == first.to_json()
    assert (asked.output / "results" / "t-tame.jsonl").read_bytes() == rows
    more = ttame.run(plan(imagenet, methods=("grad-cam", "t-tame")), tiny("resnet50"))
    assert [line.method for line in more.lines(more.printed[0])] == ["Grad-CAM", "T-TAME"]
    assert file.read_bytes() == before


def test_an_interrupted_training_continues(imagenet, monkeypatch):
    from attrib_zoo import TTAME

    asked = plan(imagenet, methods=("T-TAME",), max_steps=4)
    terms, calls = TTAME.loss_terms, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return terms(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TTAME, "loss_terms", stop)
        with pytest.raises(KeyboardInterrupt):
            ttame.run(asked, tiny("resnet50"))
    assert (asked.output / "checkpoints" / "t-tame" / "checkpoint.safetensors").exists()
    calls.clear()
    resumed = []
    fit = TTAME.fit
    monkeypatch.setattr(TTAME, "fit", lambda self, *a, **k: (resumed.append(k["resume_from"]), fit(self, *a, **k))[1])
    ttame.run(asked, tiny("resnet50"))
    assert resumed == [asked.output / "checkpoints" / "t-tame"]
    explainer = TTAME.load(asked.output / "explainers" / "t-tame.safetensors", tiny("resnet50").model)
    assert explainer.n_steps_ == 4


def test_a_folder_of_another_run_is_refused(imagenet):
    ttame.run(plan(imagenet, methods=("Grad-CAM",)), tiny("resnet50"))
    with pytest.raises(DataError, match=r"holds another run: seed 1 \(was 0\)"):
        ttame.run(plan(imagenet, methods=("Grad-CAM",), seed=1), tiny("resnet50"))
    (imagenet.parent / "out" / "plan.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        ttame.run(plan(imagenet, methods=("Grad-CAM",)), tiny("resnet50"))


# ---------------------------------------------------------------------- what cannot be


def test_methods_and_models_that_a_paper_does_not_have(imagenet, voc):
    with pytest.raises(OptionError, match=r"no row 'Grad-CAN' for this backbone; closest: 'Grad-CAM'"):
        wanted({"Grad-CAM": nn.Identity}, ("Grad-CAN",))
    with pytest.raises(UnsupportedModelError, match="CNNs only"):
        lcam.run(plan(imagenet), tiny("vit_b_16"))
    with pytest.raises(UnsupportedModelError, match="CNNs only"):
        sise.run(plan(voc), tiny("vit_b_16", 20))
    with pytest.raises(DataError, match=r"a model with 20 classes, got outputs \(1, 3\)"):
        sise.run(plan(voc), tiny("vgg16"))
    for run, folder, wanted_outputs in (
        (ttame.run, imagenet, "an output for each class"),
        (lcam.run, imagenet, "an output for each class"),
        (sise.run, voc, "20 classes"),
    ):
        said = rf"a model with {wanted_outputs}, got outputs \(1, 1\); .* use attrib-zoo evaluate"
        with pytest.raises(DataError, match=said):
            run(plan(folder), tiny("vgg16", 1))
    with pytest.raises(OptionError, match="must be one of vgg16, resnet50, vit_b_16"):
        backbones.check_name("vgg19")
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        backbones.last_linear(nn.Conv2d(1, 1, 1))
    assert slug("L-CAM-Img†") == "l-cam-img-dagger"


def test_a_picture_set_without_clear_objects(voc):
    for file in (voc / "VOCdevkit/VOC2007/Annotations").iterdir():
        file.write_text(annotation(file.stem, [("dog", (1, 1, 9, 9), 1)]))
    with pytest.raises(DataError, match="none of the 2 images holds an object"):
        sise.run(plan(voc), tiny("vgg16", 20))


# ---------------------------------------------------------------------- the head


def test_the_head_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(60, 5, generator=generator) * 10 + 3, torch.ones(60, 1)], 1)
    labels = torch.stack([(features[:, 0] > 3).float(), torch.zeros(60)], 1)
    weight, bias = fit_logistic(features, labels, 2000)
    scores = features @ weight.T + bias
    assert ((scores[:, 0] > 0) == (labels[:, 0] > 0)).double().mean() > 0.95
    assert scores[:, 1].sigmoid().max() < 0.05
    assert weight[0, 0] * features[:, 0].std() > 3 * (weight[0, 1:5] * features[:, 1:5].std(0)).abs().max()


def test_a_head_of_another_backbone_is_refused(voc):
    asked = plan(voc, methods=("Grad-CAM",), head_steps=1)
    sise.run(asked, tiny("vgg16"), train_head=True)
    (asked.output / "plan.json").unlink()
    with pytest.raises(DataError, match=r"head.safetensors' is not of this backbone"):
        sise.run(asked, tiny("resnet50"), train_head=True)


# ---------------------------------------------------------------------- the command


def words(paper: str, backbone: str, data: Path, *more: str) -> list[str]:
    small = ["--batch-size", "2", "--workers", "0", "--device", "cpu"]
    return [
        "reproduce",
        paper,
        "--backbone",
        backbone,
        "--data",
        str(data),
        "--output",
        str(data.parent / "out"),
        *small,
        *more,
    ]


@pytest.fixture
def tiny_models(monkeypatch):
    """torchvision's models, but tiny."""
    asked = []

    def load(name, weights=None, *, classes=1000, device="cpu"):
        asked.append((name, weights, classes, device))
        return tiny(name, classes)

    monkeypatch.setattr(backbones, "load_backbone", load)
    return asked


def test_the_command_prints_our_rows_beside_the_printed(imagenet, voc, tiny_models, capsys):
    more = ["--test-images", "2", "--val-images", "1", "--max-steps", "1", "--methods", "Grad-CAM,T-TAME"]
    assert main(words("ttame", "resnet50", imagenet, *more)) == 0
    text = capsys.readouterr().out
    assert "Table 2, resnet50" in text
    assert "Table 4, resnet50" in text
    assert "78.58" in text
    assert "comparison.md" in text
    assert main(words("sise", "vgg16", voc, "--weights", "w.pth", "--methods", "SISE")) == 2  # another run is there
    assert "holds another run" in capsys.readouterr().err
    shutil.rmtree(imagenet.parent / "out")
    assert main(words("sise", "vgg16", voc, "--weights", "w.pth", "--methods", "SISE")) == 0
    assert "60.54" in capsys.readouterr().out
    assert [entry[2] for entry in tiny_models] == [1000, 20, 20]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["tame", "vgg16"], "paper: must be"),
        (["ttame", "vgg19"], "backbone: must be one of vgg16"),
        (["lcam", "vit_b_16"], "has vgg16 and resnet50 only, got vit_b_16"),
        (["ttame", "vgg16", "--recipe", "mine"], "recipe: must be"),
        (["ttame", "vgg16"], "is no folder. What is expected is ImageNet"),
        (["sise", "vgg16"], "What is expected is PASCAL VOC 2007"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, tiny_models, capsys, change, said):
    paper, name, *more = change
    assert main(words(paper, name, tmp_path / "nowhere", *more)) == 2
    assert said in capsys.readouterr().err
    assert tiny_models == []


def test_models_are_loaded_from_files_and_from_torchvision(tmp_path, monkeypatch):
    import torchvision

    def get_model(name, weights=None, num_classes=None):
        assert weights in (None, "IMAGENET1K_V1")
        return TinyVGG(num_classes or 1000)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    torch.save(TinyVGG(20).state_dict(), tmp_path / "w.pth")
    found = protocols.load_backbone("vgg16", tmp_path / "w.pth", classes=20)
    assert found.name == "vgg16"
    assert not found.model.training
    backbones.check_output(found, 20)
    with pytest.raises(DataError, match=r"a model with 1000 classes, got 20 in '.*w.pth'$"):
        protocols.load_backbone("vgg16", tmp_path / "w.pth")
    torch.save(TinyVGG(1).state_dict(), tmp_path / "one.pth")
    with pytest.raises(DataError, match=r"1000 classes, got 1 in '.*one.pth'; the papers have none with one logit"):
        protocols.load_backbone("vgg16", tmp_path / "one.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError, match="does not fit the model"):
        protocols.load_backbone("vgg16", tmp_path / "other.pth")
    backbones.check_output(protocols.load_backbone("vgg16", classes=20), 20)
    with pytest.raises(OptionError, match="device: 'nonsense' cannot be used"):
        protocols.load_backbone("vgg16", device="nonsense")


def test_no_methods_at_all(imagenet, monkeypatch):
    from attrib_zoo.benchmark.protocols import plan as module

    monkeypatch.setattr(module, "CONTROLS", {})
    with pytest.raises(OptionError, match="at least one method"):
        measure({}, tiny("vgg16"), [], "ad", plan(imagenet), "results")
