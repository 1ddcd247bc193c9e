"""A model and its explainer as one program: an ordinary module, an ``.onnx`` file, a ``.pt2`` file."""
