"""A model and its explainer as one program: a plain module, an ``.onnx`` file, a ``.pt2`` file."""
