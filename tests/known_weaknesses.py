"""Which methods fail which check of test_sanity.py: the tests expect it and docs/methods.md says it."""

OFF_TARGET: dict[str, frozenset[str]] = {"cnn": frozenset(), "vit": frozenset({"DeepFeatureFactorization", "EigenCAM"})}
"""Kind of model -> methods whose maps do no better than chance, or than the other object."""

BLIND: dict[str, dict[str, float]] = {
    "cnn": {
        "DeepFeatureFactorization": 1.00,
        "EigenCAM": 1.00,
        "FullGrad": 0.83,
        "GradCAMPlusPlus": 0.56,
        "LayerCAM": 0.56,
        "RefineCAM": 0.75,
        "SIDU": 0.56,
        "SmoothGradCAMPlusPlus": 0.56,
    },
    "vit": {
        "AttentionRollout": 1.00,
        "DeepFeatureFactorization": 1.00,
        "EigenCAM": 1.00,
        "ExtremalPerturbation": 0.66,
        "FullGrad": 0.91,
        "LCAMImg": 0.50,
        "RISE": 0.62,
    },
}
"""Kind of model -> method -> rank correlation of its maps with those of the model whose last layer is random."""
