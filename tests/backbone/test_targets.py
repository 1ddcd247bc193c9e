"""Targets against Captum's own selection, which the library does not use."""

from __future__ import annotations

import numpy as np
import pytest
import strategies as zoo
import torch
from captum._utils.common import _select_targets
from hypothesis import given
from hypothesis import strategies as st

from attrib_zoo.backbone.targets import Contrast, Target, TargetQuery, check_outputs
from attrib_zoo.errors import AttribZooError, TargetError, UnsupportedModelError


def scores_for(target, outputs, score="logit", **options):
    return TargetQuery(target, **options).resolve(outputs).select(outputs, score)


# ---------------------------------------------------------------------- forms


@given(st.data())
def test_every_form_for_one_class_selects_what_captum_selects(data):
    out = data.draw(zoo.outputs(axes=1))
    n, c = len(out), data.draw(st.integers(0, out.shape[1] - 1))
    wanted = _select_targets(out, c)
    same = [c, (c,), [c] * n, [(c,)] * n, torch.tensor(c), torch.tensor([c]), torch.full((n,), c, dtype=torch.int32)]
    same += [np.int64(c), np.full(n, c), np.full(n, c, dtype=np.uint8), [torch.tensor(c)] * n]
    for form in same:
        assert torch.equal(scores_for(form, out)[:, 0], wanted), form


@given(st.data())
def test_one_class_per_example_selects_what_captum_selects(data):
    out = data.draw(zoo.outputs(axes=1))
    each = [place[0] for place in data.draw(zoo.positions(out))]
    wanted = _select_targets(out, each)
    for form in (each, torch.tensor(each), [(c,) for c in each], np.array(each)):
        assert torch.equal(scores_for(form, out)[:, 0], wanted), form


@given(st.data())
def test_tuples_index_outputs_with_more_axes(data):
    out = data.draw(zoo.outputs(axes=2))
    each = data.draw(zoo.positions(out))
    assert torch.equal(scores_for(each, out)[:, 0], _select_targets(out, each))
    assert torch.equal(scores_for(each[0], out)[:, 0], _select_targets(out, each[0]))


@given(zoo.outputs(axes=1))
def test_none_is_the_argmax_of_each_example(out):
    found = TargetQuery().resolve(out)
    assert found.classes[:, 0].tolist() == [row.index(max(row)) for row in out.tolist()]
    assert torch.equal(found.select(out)[:, 0], out.amax(1))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)])
def test_one_logit_is_two_classes_and_none_follows_its_sign(shape):
    z = torch.tensor([-2.0, 0.5, 0.0], dtype=torch.float64)
    out = z.reshape(shape)
    target = TargetQuery().resolve(out)
    assert target.classes.tolist() == [[0], [1], [0]]  # a tie goes to the first, as in an argmax
    assert target.select(out).tolist() == [[2.0], [0.5], [0.0]]
    both = torch.stack([-z, z], 1)  # what the same model says with two outputs
    probabilities = torch.stack([torch.zeros(3), z], 1).softmax(1)
    for form in (0, 1, [0, 1, 1], torch.tensor([1, 0, 1]), (1,), [(0,), (1,), (0,)]):
        wanted = TargetQuery(form).resolve(both)
        assert torch.equal(TargetQuery(form).resolve(out).classes, wanted.classes)
        assert torch.equal(scores_for(form, out), wanted.select(both))
        for score in ("softmax", "sigmoid"):
            torch.testing.assert_close(scores_for(form, out, score), wanted.select(probabilities), rtol=1e-12, atol=0)
        torch.testing.assert_close(scores_for(form, out, "logsoftmax"), wanted.select(probabilities.log()))
    assert torch.equal(scores_for([0, 1], out, many=True), both)


@given(st.data())
def test_many_targets_are_their_columns_one_by_one(data):
    out = data.draw(zoo.outputs(axes=1, batch=3))
    class_ = st.integers(0, out.shape[1] - 1)
    table = data.draw(
        st.integers(1, 4).flatmap(lambda t: st.lists(st.lists(class_, min_size=t, max_size=t), min_size=3, max_size=3))
    )
    wanted = torch.stack([_select_targets(out, list(column)) for column in zip(*table, strict=True)], 1)
    for form in (table, torch.tensor(table), np.array(table), [torch.tensor(row) for row in table]):
        assert torch.equal(scores_for(form, out, many=True), wanted), form
    row = table[0]
    wanted = torch.stack([_select_targets(out, c) for c in row], 1)
    for form in (row, tuple(row), torch.tensor(row), np.array(row)):
        assert torch.equal(scores_for(form, out, many=True), wanted), form


@given(st.data())
def test_rows_repeats_the_targets_of_the_examples_asked_for(data):
    out = data.draw(zoo.outputs())
    each = data.draw(zoo.positions(out))
    picked = torch.tensor(data.draw(st.lists(st.integers(0, len(out) - 1), min_size=1, max_size=6)))
    target = TargetQuery(each).resolve(out)
    assert torch.equal(target.rows(picked).select(out[picked]), target.select(out)[picked])


# ---------------------------------------------------------------------- scores


@given(st.data())
def test_scores_are_the_usual_functions_of_the_logits(data):
    out = data.draw(zoo.outputs(axes=1))
    each = [place[0] for place in data.draw(zoo.positions(out))]
    rows = [[float(v) for v in row] for row in out]
    exp = [[np.exp(v) for v in row] for row in rows]
    softmax = torch.tensor([e[c] / sum(e) for e, c in zip(exp, each, strict=True)])
    logistic = torch.tensor([1 / (1 + np.exp(-row[c])) for row, c in zip(rows, each, strict=True)])
    for name, wanted in {"softmax": softmax, "logsoftmax": softmax.log(), "sigmoid": logistic}.items():
        torch.testing.assert_close(scores_for(each, out, name)[:, 0], wanted, rtol=1e-12, atol=1e-12)


def test_scores_of_half_precision_are_computed_in_float32():
    out = torch.tensor([[0.0, -20.0]], dtype=torch.float16)  # exp(-20) is nothing in half precision
    found = scores_for(1, out, "softmax")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.item(), float(np.exp(-20.0)), rtol=1e-5, atol=0)


def test_select_keeps_the_graph():
    out = zoo.normal(2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(scores_for([2, 0], out).sum(), out)
    assert grad.tolist() == [[0, 0, 1], [1, 0, 0]]


# ---------------------------------------------------------------------- refusals

OUT = zoo.normal(3, 5)


@pytest.mark.parametrize("target", [5, -1, [0, 1, 5], [0, -1, 1], torch.tensor([0, 1, 9]), (7,), np.int64(5), 2**70])
def test_absent_classes_are_refused_with_the_number_of_classes(target):
    with pytest.raises(TargetError, match=r"a class in 0\.\.4 \(the model has 5 classes\)"):
        TargetQuery(target).resolve(OUT)


@pytest.mark.parametrize(
    "target",
    [
        [0, 1], [0] * 4, [], torch.tensor([0, 1, 2, 3]), torch.tensor([], dtype=torch.long),
        torch.zeros(3, 1, dtype=torch.long), np.zeros((3, 2), dtype=int),
        1.0, True, 1j, "cat", {0}, [True] * 3, [1.5] * 3, ["1"] * 3, [None] * 3, [[0], [1], [2]],
        torch.tensor([0.0, 1, 2]), torch.tensor([True] * 3), [torch.tensor(True)] * 3, [torch.tensor(1.0)] * 3,
        np.array([True] * 3), np.array([0.0, 1.0, 2.0]), (0, 0), (), [()] * 3, [(0, 0)] * 3,
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_target_is_refused_with_the_forms_there_are(target):
    with pytest.raises(TargetError, match=r"target: must .*, got .*; pass an int, a list"):
        TargetQuery(target).resolve(OUT)


@pytest.mark.parametrize(
    "targets",
    [
        [], 3, None, "12", {1, 2}, [[0, 1]] * 2, [[0], [1, 2], [3]], [[], [], []], [*[[0, 1]] * 2, 3],
        torch.tensor(2), torch.zeros(3, 2, 2, dtype=torch.long),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_list_of_targets_is_refused(targets):
    with pytest.raises(TargetError, match=r"^targets?: must "):
        TargetQuery(targets, many=True).resolve(OUT)


def test_one_absent_class_among_many_is_refused():
    for targets in ([0, 5], [[0, 1], [2, 3], [4, 5]]):
        with pytest.raises(TargetError, match="5 classes"):
            TargetQuery(targets, many=True).resolve(OUT)


def test_outputs_with_more_axes_need_a_target():
    with pytest.raises(TargetError, match=r"must be given for an output of shape \(2, 3, 4\)"):
        TargetQuery().resolve(zoo.normal(2, 3, 4))
    with pytest.raises(TargetError, match=r"must index 2 axis\(es\)"):
        TargetQuery(1).resolve(zoo.normal(2, 3, 4))
    with pytest.raises(TargetError, match=r"output shape \(2, 3, 4\)\), got \(0, 4\)"):
        TargetQuery((0, 4)).resolve(zoo.normal(2, 3, 4))


@pytest.mark.parametrize("target", [2, -1, [0, 1, 2]])
def test_one_logit_has_two_classes(target):
    for shape in ((3,), (3, 1)):
        with pytest.raises(TargetError, match=r"must be 0 or 1 \(the model has one logit.*got (2|-1)"):
            TargetQuery(target).resolve(zoo.normal(*shape))


def test_target_errors_are_index_errors():
    with pytest.raises(IndexError):
        TargetQuery(9).resolve(OUT)
    assert issubclass(TargetError, AttribZooError)


def test_target_holds_positions():
    target = Target(torch.tensor([[[1], [2]], [[0], [0]]]))
    assert target.count == 2
    assert target.classes.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            (zoo.normal(2, 3), zoo.normal(2, 3)),
            r"must return one tensor of scores \(N, K\), or an object .* \.logits, got tuple; wrap it",
        ),
        ({"logits": zoo.normal(2, 3)}, "got dict"),
        (None, "got NoneType"),
        (torch.tensor(1.0), r"one row of scores per image \(N=2\), got shape \(\)"),
        (zoo.normal(3, 5), r"\(N=2\), got shape \(3, 5\)"),
        (torch.zeros(2, 3, dtype=torch.long), "floating-point scores, got torch.int64; return the logits"),
    ],
)
def test_outputs_that_are_no_scores_are_refused(found, words):
    with pytest.raises(UnsupportedModelError, match=words):
        check_outputs(found, 2)


def test_outputs_that_are_scores_pass():
    out = zoo.normal(2, 3)
    assert check_outputs(out, 2) is out


# ---------------------------------------------------------------------- contrasts


def by_hand(row, own, k, weight):
    """The formula on one row of scores, a list."""
    rivals = sorted((c for c in range(len(row)) if c != own), key=lambda c: -row[c])[:k]
    return row[own] - weight * sum(row[c] for c in rivals) / len(rivals)


@given(st.data(), st.integers(1, 7), st.floats(0, 2))
def test_a_contrast_is_the_formula(data, k, weight):
    out = data.draw(zoo.outputs(axes=1))
    each = [place[0] for place in data.draw(zoo.positions(out))]
    found = TargetQuery(Contrast(k, weight, each)).resolve(out)
    wanted = [by_hand(row, own, k, weight) for row, own in zip(out.tolist(), each, strict=True)]
    assert found.select(out)[:, 0].tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.classes[:, 0].tolist() == each
    assert found.others.shape == (len(out), 1, min(k, out.shape[1] - 1))
    decided = scores_for(Contrast(k, weight), out)[:, 0].tolist()
    assert decided == pytest.approx([by_hand(row, row.index(max(row)), k, weight) for row in out.tolist()], abs=1e-12)


@given(st.data(), st.integers(1, 7))
def test_a_contrast_of_deeper_outputs_stays_at_its_place(data, k):
    out = data.draw(zoo.outputs(axes=2))
    each = data.draw(zoo.positions(out))
    wanted = [by_hand(row[:, j].tolist(), c, k, 0.6) for row, (c, j) in zip(out, each, strict=True)]
    assert scores_for(Contrast(k, target=each), out)[:, 0].tolist() == pytest.approx(wanted, abs=1e-12)


@given(st.data())
def test_rivals_stay_those_of_the_clean_outputs(data):
    out = data.draw(zoo.outputs(axes=1, batch=3))
    target = TargetQuery(Contrast(2, 0.5)).resolve(out)
    other = zoo.normal(*out.shape, seed=3)
    rows = torch.tensor([len(out) - 1, 0])
    wanted = [
        other[i, int(target.classes[n, 0])] - 0.5 * other[i, target.others[n, 0]].mean() for i, n in enumerate(rows)
    ]
    assert target.rows(rows).select(other[:2])[:, 0].tolist() == pytest.approx([float(w) for w in wanted])


def test_targets_of_several_widths_stand_side_by_side():
    out = torch.tensor([[1.0, 4.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    found = TargetQuery([Contrast(1, 1.0), 2, Contrast(3, 1.0, [0, 3])], many=True).resolve(out)
    torch.testing.assert_close(found.select(out), torch.tensor([[1.0, 2.0, -2.0]] * 2, dtype=torch.float64))
    assert found.shares[0].flatten().tolist() == pytest.approx([1.0, 0, 0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3])
    alone = found.one_of(torch.tensor([1, 0]), torch.tensor([2, 1]))
    assert alone.select(out.flip(0))[:, 0].tolist() == pytest.approx([-2.0, 2.0])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (3, 1, 4)])
def test_a_contrast_needs_two_classes(shape):
    target = (0, 2) if len(shape) == 3 and shape[2] > 1 else None
    with pytest.raises(TargetError, match="needs at least two classes"):
        scores_for(Contrast(target=target), torch.zeros(shape))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Contrast(0), "k: must be a positive integer"),
        (lambda: Contrast(2, -0.1), "weight: must be a number of at least 0"),
        (lambda: Contrast(2, target=Contrast(1)), "must name a class"),
        (lambda: scores_for(Contrast(2, target=9), torch.zeros(2, 4)), "must be a class in 0..3"),
        (lambda: scores_for([Contrast(2)], torch.zeros(2, 4)), "one entry for each of the 2 images"),
        (lambda: scores_for([Contrast(2), None], torch.zeros(2, 4)), "must be an integer class"),
    ],
)
def test_wrong_contrasts_say_so(wrong, words):
    with pytest.raises(AttribZooError, match=words):
        wrong()
