"""Methods times measures over a loader: numbers, batches, controls, costs, and what is refused."""

from __future__ import annotations

import math

import captum.attr
import pytest
import strategies as zoo
import torch
from benchmark_cases import CHEAP, IMAGES, Batches, Counted, Linear, assert_same, brightness
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attrib_zoo import RISE, TTAME, AblationCAM, GradCAM, ScoreCAM, metrics, synthetic
from attrib_zoo.benchmark import FAMILIES, Measure, Table, evaluate
from attrib_zoo.benchmark.controls import CONTROLS, blob, chance, edges, perfect
from attrib_zoo.benchmark.cost import Cost, measured, peak_bytes
from attrib_zoo.benchmark.measures import chosen
from attrib_zoo.errors import AttribZooError, DataError, InputError, OptionError
from attrib_zoo.masking import IMAGENET_MEAN, IMAGENET_STD, black

CHEAP_FAMILIES = "ad,ic,drop,increase,insertion,sparseness"
TENTHS = tuple(i / 10 for i in range(1, 10))


@pytest.fixture(scope="module")
def model():
    return zoo.small_cnn()


def run(model, methods=CHEAP, loader=None, wanted="ad,sparseness", **options) -> Table:
    options = {"controls": False, "show_progress": False, **options}
    return evaluate(model, methods, Batches(3) if loader is None else loader, wanted, **options)


# ---------------------------------------------------------------------- numbers


def test_a_tables_numbers_are_those_of_the_metrics(model):
    method = GradCAM(model, upsample=False)
    table = run(
        model, {"cam": method}, wanted=f"{CHEAP_FAMILIES},road,deletion,variation,infidelity,sensitivity", seed=5
    )
    target = model(IMAGES).argmax(1)
    maps = torch.cat([method.attribute(x, target=t) for x, t in zip(IMAGES.split(3), target.split(3), strict=True)])
    asked = (model, IMAGES, maps, target)
    seed = list(range(5, 12))
    wanted = {
        "AD(100)": 100 * metrics.average_drop(*asked, keep=1.0),
        "AD(15)": 100 * metrics.average_drop(*asked, keep=0.15),
        "IC(50)": 100 * metrics.increase_in_confidence(*asked, keep=0.5),
        "Drop%": 100 * metrics.drop_rate(*asked),
        "Increase%": 100 * metrics.increase_rate(*asked),
        "ROAD MoRF": 100 * metrics.road(*asked, order="morf", fractions=TENTHS, seed=seed),
        "ROAD LeRF": 100 * metrics.road(*asked, order="lerf", fractions=TENTHS, seed=seed),
        "insertion": 100 * metrics.insertion(*asked, steps=32, seed=seed),
        "deletion": 100 * metrics.deletion(*asked, steps=32, seed=seed),
        "sparseness": metrics.sparseness(*asked),
        "variation": metrics.total_variation(*asked),
        "infidelity": metrics.infidelity(*asked, seed=seed),
        "sensitivity": metrics.sensitivity_max(*asked, explain=lambda x, t: method.attribute(x, t), seed=seed),
    }
    percent = {measure.name: measure.percent for measure in table.measures}
    for name, values in wanted.items():
        atol = 1e-3 if percent[name] else 1e-7
        torch.testing.assert_close(table.values("cam", name), values.double(), rtol=1e-4, atol=atol, msg=name)
    assert set(wanted) <= {m.name for m in table.measures}
    curve = metrics.road_curve(*asked, order="morf", fractions=TENTHS, seed=seed).double().mean(0)
    torch.testing.assert_close(table.curve("cam", "ROAD MoRF"), curve, rtol=1e-4, atol=1e-5)
    rows = table.records.rows
    clean = model(IMAGES).softmax(1).amax(1).tolist()
    assert [rows["cam", i].target for i in range(7)] == target.tolist()
    assert [rows["cam", i].clean for i in range(7)] == pytest.approx(clean, rel=1e-5)


@pytest.mark.parametrize("masking", ["blur", "standardized"])
def test_gains_are_those_of_the_metrics(model, masking):
    table = run(model, {"cam": brightness}, wanted="srg,srg-hidden,srg-insertion,hiding", masking=masking, seed=5)
    asked = (model, IMAGES, brightness(IMAGES, None), model(IMAGES).argmax(1))
    options = {"seed": list(range(5, 12))}
    removal = {"fractions": TENTHS, **options}
    wanted = {
        "SRG": metrics.symmetric_relevance_gain(*asked, **removal),
        "hidden SRG": metrics.symmetric_relevance_gain(*asked, hiding=masking, **removal),
        "ins - del": metrics.symmetric_relevance_gain(*asked, form="insertion", steps=32, **options),
        "hidden MoRF": metrics.road(*asked, order="morf", hiding=masking, **removal),
        "hidden LeRF": metrics.road(*asked, order="lerf", hiding=masking, **removal),
    }
    assert [m.name for m in table.measures] == list(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(table.values("cam", name), 100 * values.double(), rtol=1e-4, atol=1e-3, msg=name)


def test_the_grid_pointing_game_is_played_among_a_batch():
    """A method that marks the cell whose colour is that of the asked class has 1; the true region is not known."""

    class Colours(nn.Module):
        """Logit c is high where channel c is bright."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(20.0))

        def forward(self, x):
            return self.gain * x.mean((2, 3))

    images = torch.zeros(6, 5, 8, 8)
    classes = torch.tensor([0, 1, 2, 3, 3, 4])
    images[torch.arange(6), classes] = 1
    images[5] = 0.1  # the model is not sure of this one
    seen = {"right": 0}

    def right(inputs, target):
        seen["right"] += len(inputs)
        return inputs[torch.arange(len(inputs)), target][:, None]

    def blind(inputs, target):
        return torch.ones_like(inputs[:, :1]) + inputs.sum(1, keepdim=True)

    batch = {"image": images, "target": classes, "masks": torch.ones(6, 8, 8)}
    methods = {"right": right, "blind": blind}
    table = run(Colours(), methods, [batch], "grid", controls=True)
    assert table.values("right", "grid pointing")[:5].tolist() == pytest.approx([100] * 5)
    assert table.values("chance", "grid pointing").tolist() == pytest.approx([25] * 6)
    assert table.values("right", "grid pointing").isnan().tolist() == [False] * 5 + [True]
    assert table.values("perfect map", "grid pointing").isnan().all()


def test_maps_of_zeros_are_ranked_as_the_metrics_rank_them(model):
    def sparse(inputs, target):
        maps = torch.zeros(len(inputs), 1, 16, 16)
        maps[:, :, 3, 4] = 1  # under 15 % of the pixels: the rest of what is shown is drawn
        return maps

    wanted = "ad,ic,drop,increase,road,insertion,deletion"
    table = run(model, {"sparse": sparse, "zeros": lambda x, t: 0 * sparse(x, t)}, wanted=wanted, seed=5)
    target, seed = model(IMAGES).argmax(1), list(range(5, 12))
    for name, maps in (("sparse", sparse(IMAGES, target)), ("zeros", 0 * sparse(IMAGES, target))):
        asked = (model, IMAGES, maps, target)
        found = {
            "AD(15)": metrics.average_drop(*asked, keep=0.15),
            "IC(50)": metrics.increase_in_confidence(*asked, keep=0.5),
            "Drop%": metrics.drop_rate(*asked, seed=seed),
            "Increase%": metrics.increase_rate(*asked, seed=seed),
            "ROAD LeRF": metrics.road(*asked, order="lerf", fractions=TENTHS, seed=seed),
            "insertion": metrics.insertion(*asked, steps=32, seed=seed),
            "deletion": metrics.deletion(*asked, steps=32, seed=seed),
        }
        for measure, values in found.items():
            torch.testing.assert_close(table.values(name, measure), 100 * values.double(), rtol=1e-4, atol=1e-3)
        whole = metrics.drop_rate(*asked, ties="threshold")  # all of the image is shown: nothing is lost
        assert whole.tolist() == [0] * 7
        assert (table.values(name, "Drop%") > 0).any()


def test_road_as_the_authors_released_it(model):
    maps = {"cam": GradCAM(model)}  # with zeros
    table = run(model, maps, wanted="road-released", seed=5)
    target = model(IMAGES).argmax(1)
    options = {"fractions": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), "reduce": "accuracy", "ties": "threshold"}
    for name, order in (("ROAD MoRF, released", "morf"), ("ROAD LeRF, released", "lerf")):
        attributions = torch.cat(
            [maps["cam"].attribute(x, t) for x, t in zip(IMAGES.split(3), target.split(3), strict=True)]
        )
        wanted = metrics.road(model, IMAGES, attributions, target, order=order, seed=list(range(5, 12)), **options)
        torch.testing.assert_close(table.values("cam", name), 100 * wanted.double(), rtol=1e-4, atol=1e-3)
        assert {round(7 * float(v) / 100, 3) % 1 for v in table.values("cam", name)} == {0}
        assert table.curve("cam", name).shape == (7,)
    assert [m.lower for m in table.measures] == [True, False]


def test_regions_are_measured_where_the_data_has_them(model):
    masks = torch.zeros(7, 16, 16, dtype=torch.bool)
    masks[:, :8] = True
    others = ~masks
    loader = [
        {"image": IMAGES[i : i + 3], "target": torch.full((len(IMAGES[i : i + 3]),), 2), "masks": masks[i : i + 3]}
        for i in (0, 3, 6)
    ]
    table = run(model, loader=loader, wanted=None)
    names = [m.name for m in table.measures]
    assert names[-4:] == ["EBPG", "mIoU", "Bbox", "pointing game"]
    maps = brightness(IMAGES, None)
    target = torch.full((7,), 2)
    region = {"masks": masks}
    for name, function in (
        ("EBPG", metrics.energy_pointing_game),
        ("mIoU", metrics.miou),
        ("Bbox", metrics.bbox_score),
    ):
        wanted = 100 * function(model, IMAGES, maps, target, **region).double()
        torch.testing.assert_close(table.values("brightness", name), wanted, rtol=1e-4, atol=1e-3)
    assert {row.target for row in table.records.rows.values()} == {2}
    flat = {"flat": lambda inputs, target: torch.zeros(len(inputs), 1, 4, 4)}
    tied = run(model, flat, loader, "miou,bbox,pointing", seed=3)  # ties are drawn for each image
    ranked = {"mIoU": metrics.miou, "Bbox": metrics.bbox_score, "pointing game": metrics.pointing_game}
    for name, function in ranked.items():
        wanted = 100 * function(model, IMAGES, torch.zeros(7, 1, 4, 4), target, **region, seed=list(range(3, 10)))
        torch.testing.assert_close(tied.values("flat", name), wanted.double(), rtol=1e-4, atol=1e-3)
    for start, batch in zip((0, 3, 6), loader, strict=True):
        batch["other_masks"] = others[start : start + 3]
    table = run(model, loader=loader, wanted="discrimination")
    share = metrics.class_discrimination(model, IMAGES, maps, target, masks=masks, other_masks=others)
    torch.testing.assert_close(table.values("brightness", "discrimination"), 100 * share.double(), rtol=1e-4, atol=1e-3)


def test_the_batch_size_changes_nothing_and_samples_weigh_alike(model):
    methods = {**CHEAP, "flat": lambda inputs, target: torch.zeros(len(inputs), 1, 4, 4)}
    options = {"wanted": "ad,ic,drop,insertion,sparseness", "controls": True}
    tables = [run(model, methods, Batches(size), **options) for size in (1, 3, 7)]
    for table in tables[1:]:
        assert_same(tables[0], table, exact=False)
    ends = tables[1].values("brightness", "AD(15)")
    assert len(ends) == 7
    assert tables[1].estimate("brightness", "AD(15)").mean == pytest.approx(float(ends.mean()))
    batches = [float(part.mean()) for part in ends.split(3)]
    assert abs(sum(batches) / 3 - float(ends.mean())) > 1e-3  # a mean of means would be another number
    one, two = (run(model, loader=Batches(size), wanted="road") for size in (1, 7))
    for name in ("ROAD MoRF", "ROAD LeRF"):  # its equations are solved up to a tolerance
        a, b = one.values("brightness", name), two.values("brightness", name)
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)


def test_only_so_many_images(model):
    loader = Batches(3)
    table = run(model, loader=loader, max_images=5)
    assert table.images == [0, 1, 2, 3, 4]
    assert loader.given == 2
    assert_same(run(model, loader=Batches(5, IMAGES[:5])), table, exact=False)
    loader = Batches(3)
    assert run(model, loader=loader, max_images=3).images == [0, 1, 2]
    assert loader.given == 1, "no batch is read in vain"
    assert run(model, max_images=100).images == list(range(7))
    batches = [{"image": IMAGES[:3], "target": torch.tensor([0, 1, 2]), "epoch": 4, "names": ["a", "b", "c"]}]
    assert [row.target for row in run(model, loader=batches, max_images=2).records.rows.values()] == [0, 0, 1, 1]


def test_the_loaders_forms_are_alike(model):
    plain = run(model)
    dataset = TensorDataset(IMAGES, torch.zeros(7, dtype=torch.long))  # labels are not what is explained
    assert_same(plain, run(model, loader=DataLoader(dataset, 3)))
    assert_same(plain, run(model, loader=[{"pixel_values": part} for part in IMAGES.split(3)]))
    assert_same(plain, run(model, loader=iter(Batches(3))))


def test_captum_and_functions_are_methods_too(model):
    saliency = captum.attr.Saliency(model)
    table = run(model, {"saliency": saliency, "three axes": lambda inputs, target: inputs[:, 0]})
    target = model(IMAGES).argmax(1)
    maps = saliency.attribute(IMAGES.clone().requires_grad_(), target=target)
    for name, found in (("saliency", maps), ("three axes", IMAGES[:, 0])):
        wanted = 100 * metrics.average_drop(model, IMAGES, found, target, keep=0.5).double()
        torch.testing.assert_close(table.values(name, "AD(50)"), wanted, rtol=1e-4, atol=1e-3)


def test_own_metrics(model):
    def share(model, inputs, attributions, target):
        return (attributions > 0).float().mean((1, 2, 3)) + target

    table = run(model, wanted={"share": share})
    target = model(IMAGES).argmax(1)
    torch.testing.assert_close(
        table.values("brightness", "share"), share(model, IMAGES, brightness(IMAGES, target), target).double()
    )
    seen = Measure("seen", lambda asked: torch.stack([asked.clean, asked.clean + 1], 1), points=(0.0, 1.0), area=True)
    table = run(model, wanted=["sparseness", seen])
    clean = model(IMAGES).softmax(1).amax(1).double()
    torch.testing.assert_close(table.values("darkness", "seen"), 100 * (clean + 0.5), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        table.curve("darkness", "seen"), torch.stack([clean.mean(), clean.mean() + 1]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("found", "got"),
    [(torch.tensor(0.5), r"got \(\)"), (torch.zeros(2), r"got \(2,\)"), (0.5, "got float"), (None, "got NoneType")],
)
def test_a_metric_that_gives_no_number_per_image_is_named(model, found, got):
    with pytest.raises(OptionError, match=r"'mine' must give one number per image, \(3,\), " + got):
        run(model, wanted={"mine": lambda *_: found})


@pytest.mark.parametrize("named", [False, True])
def test_a_multi_label_model_is_measured_by_the_probability_of_each_class(model, named):
    """Of the class that the batch names, whatever the other classes are given."""
    target = torch.tensor([2, 0, 1, 2, 0, 1, 1]) if named else model(IMAGES).argmax(1)
    loader = [{"image": x, "target": t} for x, t in zip(IMAGES.split(3), target.split(3), strict=True)]
    families = "ad,ic,drop,increase,road,road-released,insertion,deletion,hiding,grid"
    table = run(model, loader=loader if named else None, wanted=families, score="sigmoid", seed=5)
    asked, seed = (model, IMAGES, brightness(IMAGES, target), target), list(range(5, 12))
    read = {"score": "sigmoid", "seed": seed}
    kept = {"fractions": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), "reduce": "accuracy", "ties": "threshold"}
    wanted = {
        "AD(100)": metrics.average_drop(*asked, score="sigmoid"),
        "IC(50)": metrics.increase_in_confidence(*asked, keep=0.5, score="sigmoid"),
        "Drop%": metrics.drop_rate(*asked, **read),
        "Increase%": metrics.increase_rate(*asked, **read),
        "ROAD MoRF": metrics.road(*asked, order="morf", fractions=TENTHS, **read),
        "ROAD LeRF, released": metrics.road(*asked, order="lerf", **kept, **read),
        "insertion": metrics.insertion(*asked, steps=32, **read),
        "deletion": metrics.deletion(*asked, steps=32, **read),
        "hidden MoRF": metrics.road(*asked, order="morf", fractions=TENTHS, hiding="auto", **read),
    }
    for name, values in wanted.items():
        found = table.values("brightness", name)
        torch.testing.assert_close(found, 100 * values.double(), rtol=1e-4, atol=1e-3, msg=name)
    clean = model(IMAGES).sigmoid().gather(1, target[:, None])[:, 0].tolist()
    assert [table.records.rows["brightness", i].clean for i in range(7)] == pytest.approx(clean, rel=1e-5)


def test_a_fitted_explainer_is_measured_as_it_was_fitted(model):
    one = zoo.fit(TTAME(model, masking="standardized"), IMAGES.split(3), epochs=1)
    grey = zoo.fit(TTAME(model, mean=(0.3, 0.1, 0.2), std=(1, 1, 1)), IMAGES.split(3), epochs=1)
    for explainer, hidden in ((one, 0.0), (grey, -torch.tensor([0.3, 0.1, 0.2]).view(1, 3, 1, 1))):
        table = run(model, {"fitted": explainer, **CHEAP}, wanted="ad")
        masking = hidden if isinstance(hidden, torch.Tensor) else "standardized"
        assert_same(table, run(model, {"fitted": explainer, **CHEAP}, wanted="ad", masking=masking))
    with pytest.raises(OptionError, match=r"masking: must be given .* one: standardized, grey: "):
        run(model, {"one": one, "grey": grey}, wanted="ad")
    run(model, {"one": one, "grey": grey}, wanted="ad", masking="raw")


def test_masking_reaches_the_metrics(model):
    target = model(IMAGES).argmax(1)
    grey = torch.tensor([0.3, 0.1, 0.2])
    found = {}
    for masking in ("raw", "standardized", grey.view(3, 1, 1)):
        table = run(model, wanted="ad", masking=masking)
        drop = metrics.average_drop(model, IMAGES, brightness(IMAGES, target), target, masking=masking)
        torch.testing.assert_close(table.values("brightness", "AD(100)"), 100 * drop.double(), rtol=1e-4, atol=1e-3)
        found[str(masking)] = float(drop.mean())
    assert len(set(found.values())) == 3


def test_the_model_is_left_as_it_was(model):
    loud = zoo.small_cnn().train()
    state = {k: v.clone() for k, v in loud.state_dict().items()}
    before = torch.random.get_rng_state()
    first = run(loud, wanted="ad,insertion", controls=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loud.training
    assert all(p.requires_grad and p.grad is None for p in loud.parameters())
    assert all(torch.equal(v, state[k]) for k, v in loud.state_dict().items())
    assert_same(run(model, wanted="ad,insertion", controls=True), first)


# ---------------------------------------------------------------------- what means nothing is counted


def test_maps_without_meaning_are_counted(model):
    def spoilt(inputs, target):
        maps = brightness(inputs, target)
        maps[0, 0, 0, 0] = torch.nan
        return maps

    def constant(inputs, target):
        return torch.ones(len(inputs), 1, 8, 8)

    table = run(model, {"spoilt": spoilt, "constant": constant}, wanted="ad,ic,road")
    for measure in table.measures:
        assert table.values("spoilt", measure.name).isnan().nonzero().flatten().tolist() == [0, 3, 6], measure.name
        assert table.estimate("spoilt", measure.name).images == 4
        assert f"spoilt, {measure.name}: 3 images without a value (no region, or no finite map)" in table.notes()
        assert table.values("constant", measure.name).isfinite().all()
    assert not any(note.startswith("constant") for note in table.notes())
    target = model(IMAGES).argmax(1)
    dark = metrics.average_drop(model, IMAGES, torch.zeros(7, 1, 16, 16), target)  # no pixel is shown
    torch.testing.assert_close(table.values("constant", "AD(100)"), 100 * dark.double(), rtol=1e-4, atol=1e-3)


def test_images_without_a_region_are_counted(model):
    masks = torch.ones(7, 16, 16, dtype=torch.bool)
    masks[2] = False
    table = run(model, loader=[{"image": IMAGES, "masks": masks}], wanted="ebpg,miou,bbox,pointing,sparseness")
    for name in ("EBPG", "mIoU", "Bbox", "pointing game"):
        values = table.values("brightness", name)
        assert values.isnan().nonzero().flatten().tolist() == [2]
        assert f"brightness, {name}: 1 image without a value (no region, or no finite map)" in table.notes()
    assert table.values("brightness", "EBPG").nanmean() == pytest.approx(100)
    assert table.estimate("brightness", "EBPG").images == 6
    assert not any("sparseness" in note for note in table.notes())


def test_an_increase_is_strict_and_a_hopeless_target_has_defined_values():
    model = Linear()
    black = [{"image": torch.zeros(3, 3, 8, 8), "target": torch.tensor([0, 1, 0])}]
    table = run(model, loader=black, wanted="ad,ic", masking="standardized")  # nothing changes
    for measure in table.measures:
        assert table.values("brightness", measure.name).tolist() == [0, 0, 0]
    model.gain.data.fill_(1e4)
    bright = [{"image": torch.ones(1, 3, 8, 8) + torch.rand(1, 3, 8, 8), "target": torch.tensor([1])}]
    table = run(model, loader=bright, wanted="ad,ic,road,insertion", masking="standardized")
    assert table.records.rows["brightness", 0].clean == 0
    assert [table.values("brightness", f"AD({keep})").item() for keep in (100, 50, 15)] == [0, 0, 0]
    assert all(table.values("brightness", m.name).isfinite().all() for m in table.measures)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("maps", "got"),
    [
        (lambda x, t: x[:2], r"for N=3 images, got \(2, 3, 16, 16\)"),
        (lambda x, t: x.mean((1, 2, 3)), r"got \(3,\)"),
        (lambda x, t: x[None], r"got \(1, 3, 3, 16, 16\)"),
        (lambda x, t: x.numpy(), "got ndarray"),
        (lambda x, t: None, "got NoneType"),
    ],
)
def test_maps_of_a_wrong_shape_are_refused(model, maps, got):
    with pytest.raises(InputError, match=r"'wrong' must return maps \(N, C, H, W\), .*" + got):
        run(model, {"wrong": maps})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {}}, "methods: must name at least one method, got none"),
        ({"methods": {"x": 3}}, r"methods: 'x' must have attribute\(inputs, target=\) or be a function .*got int"),
        ({"wanted": "ad,raod"}, "metrics: no measure 'raod'; closest: 'road', 'ad'; there are ad, ic, "),
        ({"wanted": "ebpg"}, "metrics: EBPG needs masks or boxes in the loader's dict batches, got none; add them"),
        ({"wanted": "discrimination"}, "discrimination needs other_masks or other_boxes"),
        ({"wanted": "distractors"}, "distractors needs distractor_masks in the loader's dict batches"),
        ({"max_images": 0}, "max_images: must be a positive integer, got 0"),
        (
            {"masking": "black"},
            "masking: must be one of 'auto', 'raw', 'standardized', 'blur' or a tensor.*got 'black'",
        ),
        ({"score": len}, "score: must be 'softmax' or 'sigmoid', got <built-in function len>"),
        ({"score": "logit"}, "score: must be 'softmax' or 'sigmoid', got 'logit'"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options, message):
    def never(*_):
        raise AssertionError("the model was asked")

    model = Linear()
    model.register_forward_pre_hook(never)
    with pytest.raises(OptionError, match=message):
        run(model, **options)


@pytest.mark.parametrize(
    ("outputs", "score", "message"),
    [
        (lambda x: x.mean((1,)), "softmax", "target: must be given"),
    ],
)
def test_models_whose_scores_mean_nothing_are_refused(outputs, score, message):
    class Odd(Linear):
        def forward(self, inputs):
            return outputs(inputs * self.gain)

    with pytest.raises(AttribZooError, match=message):
        run(Odd(), score=score)


def test_a_loader_without_images_is_refused(model):
    with pytest.raises(DataError, match="loader: must yield at least one batch, got none"):
        run(model, loader=[])
    with pytest.raises(DataError, match="a dict batch must hold its images under one of"):
        run(model, loader=[{"pictures": IMAGES}])


def test_names_of_measures():
    assert {m.name for m in FAMILIES["ad"]} == {"AD(100)", "AD(50)", "AD(15)"}
    for family, measures in FAMILIES.items():
        assert family == family.lower()
        assert all(m.arrow == ("↓" if m.lower else "↑") for m in measures)
    table = run(zoo.small_cnn(), wanted=" AD(50) ,ic, ad(50)")
    assert [m.name for m in table.measures] == ["AD(50)", "IC(100)", "IC(50)", "IC(15)"]


# ---------------------------------------------------------------------- controls


def test_controls_stand_beside_the_methods_and_ignore_the_batch(model):
    table = run(model, controls=True, wanted="sparseness")
    assert table.methods == [*CHEAP, *CONTROLS]
    assert table.controls == ["random map", "image edges", "centre blob"]
    for name, make in CONTROLS.items():
        whole = make(0)(IMAGES, None)
        alone = torch.cat([make(0)(image[None], None) for image in IMAGES])
        assert torch.equal(whole, alone)
        side = 7 if name == "random map" else 16  # as coarse as a CAM; measures resize it as any map
        assert whole.shape == (7, 1, side, side)
    assert not torch.equal(chance(0)(IMAGES, None), chance(1)(IMAGES, None))
    two = chance(0)(IMAGES[:2], None)
    assert not torch.equal(two[0], two[1])
    names = ["random map", "chance", "perfect map"]  # whoever calls a method so means that method
    loader = [{"image": IMAGES, "masks": torch.ones(7, 16, 16)}]
    own = run(model, dict.fromkeys(names, brightness), loader, "sparseness,ebpg", controls=True)
    assert own.methods == [*names, "image edges", "centre blob"]
    wanted = run(model, wanted="sparseness").values("brightness", "sparseness")
    for name in names:
        torch.testing.assert_close(own.values(name, "sparseness"), wanted)
        assert own.values(name, "EBPG").tolist() == pytest.approx([100] * 7)


def test_the_random_map_is_a_grid_of_7_by_7():
    image = torch.rand(1, 3, 49, 49, generator=torch.Generator().manual_seed(0))
    found = chance(0)(image, None)
    assert found.shape == (1, 1, 7, 7)  # the measures scale it, then enlarge it, as all maps of layers
    assert found.unique().numel() == 49


def scaled_then_enlarged(maps):
    """The papers' order, in float64: each map to [0, 1] where it was made, then bilinear."""
    maps = maps.double()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return torch.nn.functional.interpolate((maps - low) / (high - low), size=(16, 16), mode="bilinear")


@pytest.mark.parametrize("kind", [GradCAM, TTAME])
def test_maps_are_scaled_at_layer_resolution_and_then_enlarged_once(model, kind):
    method = kind(model, upsample=False, **({"recipe": "paper", "num_layers": 1} if kind is TTAME else {}))
    if kind is TTAME:
        zoo.fit(method, [IMAGES], max_steps=3)
    target = model(IMAGES).argmax(1)
    small = method.attribute(IMAGES, target)
    assert max(small.shape[-2:]) < 16
    large = scaled_then_enlarged(small)
    assert float(large.amax((2, 3)).min()) < 0.99  # enlarging takes the extremes away: a second scaling would show
    limit = torch.quantile(large.flatten(1), 0.85, dim=1).view(-1, 1, 1, 1)
    mask = (large * (large >= limit)).float()
    colour = black(IMAGENET_MEAN, IMAGENET_STD, IMAGES)
    p = model(IMAGES).softmax(1).gather(1, target[:, None])[:, 0]
    q = model(colour + mask * (IMAGES - colour)).softmax(1).gather(1, target[:, None])[:, 0]
    wanted = 100 * ((p - q).clamp(min=0) / p).double()
    for upsample in (True, False):  # what a call returns makes no difference
        method.upsample = upsample
        table = run(model, {"cam": method}, wanted="ad")
        torch.testing.assert_close(table.values("cam", "AD(15)"), wanted, rtol=1e-4, atol=1e-3)
        assert method.upsample is upsample


def test_the_blob_is_a_gaussian_in_the_middle():
    found = blob(0)(torch.zeros(2, 3, 8, 12), None)
    y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8 - 0.5, (torch.arange(12) + 0.5) / 12 - 0.5, indexing="ij")
    torch.testing.assert_close(found, (-(x**2 + y**2) / (2 * 0.25**2)).exp().expand(2, 1, 8, 12))


def planted() -> list[dict]:
    """Two batches of scenes that say where everything is, one object by masks of another form."""
    data = synthetic.scenes(14, size=16, seed=3)
    parts = [data.rows(slice(0, 8)), data.rows(slice(8, 14))]
    return [
        {
            "image": part.inputs,
            "target": part.labels[:, 0],
            "masks": part.masks[:, :1].float(),
            "other_masks": part.masks[:, 1],
            "distractor_masks": part.distractors,
        }
        for part in parts
    ]


def test_a_perfect_map_and_chance_bracket_the_scores():
    model, loader = synthetic.tiny_cnn(size=16), planted()
    measures = "AD(50),ebpg,miou,bbox,pointing,discrimination,distractors"
    given = [m.name for m in chosen(None, list(loader[0]))]
    assert given[6:] == ["ROAD MoRF", "ROAD LeRF", *(FAMILIES[name][0].name for name in measures.split(",")[1:])]
    table = run(model, {"edges": edges(0)}, loader, f"{measures},insertion", controls=True)
    assert table.methods == ["edges", *CONTROLS, "perfect map", "chance"]
    assert table.controls == table.methods[1:]
    for name in ("EBPG", "Bbox", "pointing game", "discrimination"):
        assert table.values("perfect map", name).tolist() == [100] * 14
    assert table.values("perfect map", "distractors").tolist() == [0] * 14
    masks = torch.cat([batch["masks"][:, 0] for batch in loader]).double()
    others = torch.cat([batch["distractor_masks"] for batch in loader]).double()
    area = 100 * masks.mean((1, 2))
    torch.testing.assert_close(table.values("chance", "EBPG"), area, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table.values("chance", "Bbox"), area, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table.values("chance", "distractors"), 100 * others.mean((1, 2)), rtol=1e-4, atol=1e-6)
    both = area + 100 * torch.cat([batch["other_masks"] for batch in loader]).double().mean((1, 2))
    torch.testing.assert_close(table.values("chance", "discrimination"), 100 * area / both, rtol=1e-4, atol=1e-6)
    assert all(table.estimate("chance", name).images == 0 for name in ("AD(50)", "insertion"))
    assert not any(note.startswith("chance") for note in table.notes())
    assert table.records.costs["chance"].forward == 0
    assert table.curve("chance", "insertion").isnan().all()
    table.plot().canvas.draw()


def test_chance_is_what_random_maps_get_on_average():
    generator = torch.Generator().manual_seed(0)

    def noise(inputs, target):
        return torch.rand(len(inputs), 1, 16, 16, generator=generator)

    wanted = "ebpg,miou,bbox,discrimination,distractors"
    methods = {f"noise {i}": noise for i in range(40)}
    table = run(synthetic.tiny_cnn(), methods, planted(), wanted, controls=True)
    for measure in table.measures:
        found = torch.stack([table.values(name, measure.name) for name in methods])
        wanted = table.values("chance", measure.name)
        assert (found.mean(0) - wanted).abs().max() < 5 * found.std(0).max() / 40**0.5, measure.name
        error = float(found.std(0).mean()) / (40 * 14) ** 0.5
        assert float(found.mean()) == pytest.approx(float(wanted.mean()), abs=4 * error), measure.name


def test_chance_of_pointing_is_the_share_of_points_that_hit():
    mask = torch.zeros(1, 40, 40)
    mask[0, 20, 20] = 1
    loader = [{"image": torch.zeros(1, 3, 40, 40), "target": torch.tensor([0]), "masks": mask}]
    table = run(Linear(), {"edges": edges(0)}, loader, "pointing", controls=True)
    near = sum((y - 20) ** 2 + (x - 20) ** 2 <= 15**2 for y in range(40) for x in range(40))
    assert table.values("chance", "pointing game").tolist() == pytest.approx([100 * near / 1600])


def test_chance_of_iou_is_close_to_the_hypergeometric_mean():
    areas, size, taken = (3, 12, 40, 60, 100, 200, 256), 256, 52  # 20 % of the pixels, rounded up
    masks = torch.zeros(7, size)
    exact = []
    for mask, area in zip(masks, areas, strict=True):
        mask[:area] = 1
        both = range(max(0, taken - (size - area)), min(area, taken) + 1)
        ways = [math.comb(area, k) * math.comb(size - area, taken - k) for k in both]
        assert sum(ways) == math.comb(size, taken)
        exact.append(100 * sum(w * k / (area + taken - k) for w, k in zip(ways, both, strict=True)) / sum(ways))
    loader = [{"image": IMAGES, "masks": masks.view(7, 16, 16)}]
    found = run(zoo.small_cnn(), {"edges": edges(0)}, loader, "miou", controls=True).values("chance", "mIoU")
    assert found.tolist() == pytest.approx(exact, rel=3e-4)  # the mean over the mean union is 8e-3 off


def test_boxes_make_a_perfect_map_too_and_copies_of_images_have_copies_of_it(model):
    boxes = torch.tensor([[2, 2, 9, 7]]).expand(7, 4)
    loader = [{"image": IMAGES, "boxes": boxes}]
    table = run(model, loader=loader, wanted="ebpg,bbox,sensitivity", controls=True)
    assert table.values("perfect map", "EBPG").tolist() == [100] * 7
    assert table.values("chance", "Bbox").tolist() == pytest.approx([100 * 35 / 256] * 7)
    assert table.values("perfect map", "sensitivity").tolist() == [0] * 7
    truth = {"masks": torch.arange(3.0).view(3, 1, 1).expand(3, 2, 2)}
    copies = perfect(truth)(torch.zeros(6, 3, 2, 2), None)[:, 0, 1, 1].tolist()
    assert copies == [0, 0, 1, 1, 2, 2]
    whole = [{"image": IMAGES, "masks": torch.ones(7, 16, 16)}]
    everything = run(model, loader=whole, wanted="ebpg,bbox,pointing", controls=True)
    for measure in everything.measures:  # also where the object fills the image
        assert everything.values("perfect map", measure.name).tolist() == [100] * 7
    assert torch.equal(whole[0]["masks"], torch.ones(7, 16, 16))
    assert perfect(truth)(torch.zeros(1, 3, 2, 2), None).flatten().tolist() == [0] * 4


def test_trained_explainers_stand_beside_their_untrained_twins(model):
    fitted = TTAME(model, num_layers=1, recipe="paper").fit([IMAGES] * 40, max_steps=40, show_progress=False)
    before = {k: v.clone() for k, v in fitted.network_.state_dict().items()}
    table = run(model, {"T-TAME": fitted, "Grad-CAM": GradCAM(model)}, wanted="sparseness", controls=True)
    assert table.controls == ["T-TAME, untrained", *CONTROLS]
    twin = fitted.untrained()
    alike = twin.network_.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in fitted.network_.state_dict().items())
    assert fitted.n_steps_ == 40
    assert (twin.n_steps_, len(twin.history_)) == (0, 0)
    assert not torch.equal(twin.maps(IMAGES), fitted.maps(IMAGES))
    assert torch.equal(twin.maps(IMAGES), fitted.untrained(0).maps(IMAGES))
    assert not torch.equal(twin.maps(IMAGES), fitted.untrained(1).maps(IMAGES))
    assert alike.keys() == before.keys()
    target = model(IMAGES).argmax(1)
    wanted = metrics.sparseness(None, IMAGES, twin.attribute(IMAGES, target)).double()
    torch.testing.assert_close(table.values("T-TAME, untrained", "sparseness"), wanted)
    wanted = metrics.sparseness(None, IMAGES, fitted.untrained(3).attribute(IMAGES, target)).double()
    other = run(model, {"T-TAME": fitted}, wanted="sparseness", controls=True, seed=3)
    torch.testing.assert_close(other.values("T-TAME, untrained", "sparseness"), wanted)


def test_edges_are_where_the_image_changes():
    image = torch.zeros(1, 3, 8, 10)
    image[..., 6:] = 0.5
    found = edges(0)(image, None)[0, 0]
    wanted = torch.zeros(8, 10)
    wanted[:, 5:7] = 0.5 * 4  # Sobel: 1 + 2 + 1
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(edges(0)(image.mT, None)[0, 0], wanted.T)
    slope = torch.arange(8.0)[:, None] * 3 + torch.arange(8.0) * 4  # of length 5 in every inner pixel
    inner = edges(0)(torch.stack([slope, slope, -slope])[None], None)[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full((6, 6), 5 * 8 / 3))  # the mean of the channels counts


# ---------------------------------------------------------------------- costs


def test_samples_are_counted():
    model = Linear()

    def busy(inputs, target):
        inputs = inputs.clone().requires_grad_()
        with torch.no_grad():
            model(inputs.repeat(3, 1, 1, 1))
        outputs = model(inputs)
        (gradient,) = torch.autograd.grad(outputs[:, 0].sum(), inputs)
        doubled = model(torch.cat([inputs, inputs]))
        torch.autograd.grad(doubled.sum(), inputs)
        return gradient

    table = run(model, {"busy": busy, "idle": brightness}, wanted="sparseness")
    cost = table.records.costs["busy"]
    assert (cost.images, cost.forward, cost.backward) == (7, (3 + 1 + 2) * 7, (1 + 2) * 7)
    idle = table.records.costs["idle"]
    assert (idle.images, idle.forward, idle.backward) == (7, 0, 0)
    head, rows = table.cells()
    told = dict(zip(head, rows[0], strict=True))
    assert (told["images"], told["forward"], told["backward"]) == ("7", "6", "3")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_samples_of_our_methods(model):
    methods = {"cam": GradCAM(model), "score": ScoreCAM(model), "ablation": AblationCAM(model)}
    methods["rise"] = RISE(model, n_masks=10)
    costs = run(model, methods, wanted="sparseness").records.costs
    assert costs.pop("ablation").forward > 7 * 8  # its passes start at a layer, and count
    assert {name: (c.forward / 7, c.backward / 7) for name, c in costs.items()} == {
        "cam": (1, 1),
        "score": (1 + 8, 0),
        "rise": (1 + 10, 0),
    }


def test_costs_add_up():
    one, two = Cost(2, 4, 1, 0.5, 0.25, 10), Cost(1, 3, 0, 1.0, 0.25, None)
    assert one + two == Cost(3, 7, 1, 1.5, 0.5, 10)
    assert (one + two).times_forward == 3
    assert (two + two).peak is None
    assert Cost().times_forward != Cost().times_forward


def test_the_time_is_a_multiple_of_a_forward_pass(monkeypatch):
    model, passes = zoo.small_cnn(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for module in ("cost", "runner"):  # a clock that a pass moves on by a second, and nothing else does
        monkeypatch.setattr(f"attrib_zoo.benchmark.{module}.clock", lambda device: float(len(passes)))

    def often(inputs, target):
        with torch.no_grad():
            for _ in range(20):
                model(inputs)
        return brightness(inputs, target)

    cost = run(model, {"often": often}, Batches(3), "sparseness").records.costs["often"]
    assert (cost.seconds, cost.plain, cost.times_forward) == (60, 3, 20)


def test_costs_add_up_but_for_their_peak():
    one, two = Cost(1, 2, 3, 0.5, 0.25, 10), Cost(10, 20, 30, 1.0, 0.5, 7)
    assert one + two == Cost(11, 22, 33, 1.5, 0.75, 10)
    assert (one + Cost(peak=None)).peak == 10
    assert (Cost() + Cost()).peak is None


def test_peak_bytes_of_a_known_sequence():
    def work():
        one = torch.ones(1000)  # 4000 bytes
        two = torch.ones(500)  # 6000
        one.add_(1)
        view = one.view(10, 100)[2:]  # shares the memory of `one`
        del one, two
        three = torch.ones(1200)  # 8800: `view` holds 4000
        del view, three
        return torch.ones(900)  # 3600

    assert peak_bytes(work) == 8800
    given = torch.ones(10_000)
    assert peak_bytes(lambda: given.mul_(2)) == 0
    assert peak_bytes(lambda: given[:5] + 1) == 20


def test_memory_is_measured_where_asked(model):
    def greedy(inputs, target):
        torch.zeros(10 * len(inputs), 25_000)
        return brightness(inputs, target)

    assert run(model, wanted="sparseness").records.costs["brightness"].peak is None
    costs = run(model, {"greedy": greedy, **CHEAP}, wanted="sparseness", memory=True).records.costs
    assert 1_000_000 <= costs["greedy"].peak < 1_010_000  # of one image
    assert costs["brightness"].peak == 16 * 16 * 4


def test_a_call_that_fails_leaves_no_hooks(model):
    def wrong():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measured(wrong, model, 1)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_each_image_is_explained_once_after_a_rehearsal(model):
    """The first call may look for layers or fill caches; one image pays for that, before the clock runs."""
    method = Counted(GradCAM(model).attribute)
    table = run(model, {"counted": method}, wanted="ad,ic,deletion,sparseness")
    assert method.images == 1 + 7
    assert table.records.costs["counted"].forward == 7
