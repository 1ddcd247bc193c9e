"""What kind of model it is, judged by its modules: the one answer that all methods and measures share."""

from __future__ import annotations

from torch import nn

from attrib_zoo.backbone.module import unwrap

_PROJECTIONS = (
    ("qkv",),
    ("qk", "v"),
    ("q", "kv"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_qkv",),
    ("in_proj_weight",),
)


def attends(module: nn.Module) -> bool:
    """Whether a module itself is an attention: it holds projections to queries, keys and values."""
    return any(all(hasattr(module, name) for name in names) for names in _PROJECTIONS)


def is_transformer(model: nn.Module) -> bool:
    """Whether a model is a vision transformer rather than a convolutional network.

    T-TAME hides pixels by black for CNNs (its Eq. 13) and by the mean colour for transformers (Eq. 14); this decides
    which of the two a model is. A transformer attends, and holds more weights in linear layers than in convolutions;
    a patch embedding, whose windows do not overlap, counts for neither. So a CNN that ends in attention pooling stays
    a CNN, and a hybrid counts as what most of its weights are. Without attention (an MLP-Mixer) it is no transformer.
    """
    linear = convolution = 0
    attention = False
    for module in unwrap(model).modules():
        attention = attention or attends(module)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            linear += module.in_proj_weight.numel()
        elif isinstance(module, nn.Conv2d) and not embeds_patches(module):
            convolution += module.weight.numel()
        else:  # linear layers of other kinds too, as quantised ones
            taken, given = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if isinstance(taken, int) and isinstance(given, int):
                linear += taken * given
    return attention and linear > convolution


def embeds_patches(module: nn.Module) -> bool:
    """Whether a module is a convolution whose windows tile the image without overlap, as patch embeddings do."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == module.stride != (1, 1)
