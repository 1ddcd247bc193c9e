"""Which methods are known to fail which check of test_sanity.py: the tests expect it and docs/methods.md says it."""

BLIND = {"cnn": frozenset(), "vit": frozenset()}
OFF_TARGET = {"cnn": frozenset(), "vit": frozenset()}
