"""The public contract suite: does a method behave like Captum's own, and is it right wherever that can be checked?

Every check compares values, not shapes, on tiny random models with five classes (a CNN with BatchNorm, a net with
channels last, ViTs with one and two prefix tokens), built here from torch alone. In your own test file::

    import pytest
    from attrib_zoo.testing import CHECKS

    @pytest.mark.parametrize("name", CHECKS)
    def test_contract(name):
        CHECKS[name](MyMethod)

or all at once, in a script or a test::

    from attrib_zoo.testing import check_attribution

    check_attribution(MyMethod)

``MyMethod`` may be any subclass of ``captum.attr.Attribution``, whoever wrote it: a class, a ``functools.partial``
of it, or a function from a model to a ready object. A method that cannot find layers by itself can use the bench
model's attribute: ``lambda model: MyMethod(model, model.get_submodule(model.explained))``.

Class attributes declare what does not apply: ``models = ("cnn",)`` leaves out the ViTs, ``class_agnostic = True`` that
the target makes no difference. A class with a ``fit`` is first trained on two small batches, and the checks for
trainable methods run too.
"""

from attrib_zoo.testing import calls, traces, consumers, options, fitted  # noqa: F401, I001  # they fill CHECKS, in this order
from attrib_zoo.testing.benches import Bench, BenchModel, bench
from attrib_zoo.testing.suite import CHECKS, Check, ContractError, Factory, Inapplicable, check_attribution

__all__ = [
    "CHECKS",
    "Bench",
    "BenchModel",
    "Check",
    "ContractError",
    "Factory",
    "Inapplicable",
    "bench",
    "check_attribution",
]
