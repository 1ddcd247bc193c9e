"""Every exported method keeps every point of the contract; a new method is tested here without a line."""

from __future__ import annotations

import inspect

import pytest
from captum.attr import Attribution

import attrib_zoo
from attrib_zoo.testing import CHECKS

METHODS = {
    name: thing
    for name, thing in sorted(vars(attrib_zoo).items())
    if inspect.isclass(thing) and issubclass(thing, Attribution) and not inspect.isabstract(thing)
}


def test_the_exported_methods_are_found():
    assert {"GradCAM", "TTAME"} <= set(METHODS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method, check):
    CHECKS[check](METHODS[method])
