"""What can go wrong, and under which built-in exception a caller may also catch it.

* AttribZooError
    * InputError (ValueError): images of the wrong rank, type, size or content
    * OptionError (ValueError): a constructor or call option outside its range
    * TargetError (IndexError): no such class, or the wrong number of targets
    * LayerNotFoundError (LookupError): no layer of that name
    * LayerError (ValueError): the layer cannot be explained (not spatial, no gradient path, never ran)
    * UnsupportedModelError (ValueError): the model or its output is of a kind that the method cannot use
    * NotFittedError (RuntimeError): a trainable method asked for a map before ``fit`` or ``load``
    * TrainingError (RuntimeError): ``fit`` cannot go on
    * DataError (ValueError): a loader, folder or file that cannot be used
    * CheckpointError (ValueError): a checkpoint that is damaged, or of another class or a newer format
        * BackboneMismatchError: a checkpoint that was fitted for other weights

Each message says what must be, what was got, and what to do.
"""


class AttribZooError(Exception):
    """Base of all errors that this library raises on purpose."""


class InputError(AttribZooError, ValueError):
    """The images are not floating-point ``(N, C, H, W)`` tensors that the model can take."""


class OptionError(AttribZooError, ValueError):
    """An option is outside its range or of the wrong type."""


class TargetError(AttribZooError, IndexError):
    """The target names no output of the model, or there are too few or too many targets."""


class LayerNotFoundError(AttribZooError, LookupError):
    """The model has no layer of that name."""


class LayerError(AttribZooError, ValueError):
    """The layer exists but cannot serve: not spatial, no path to the score, or it never ran."""


class UnsupportedModelError(AttribZooError, ValueError):
    """The model, or what it returns, is of a kind that the method cannot use."""


class NotFittedError(AttribZooError, RuntimeError):
    """A trainable method was asked for a map before it was fitted or loaded."""


class TrainingError(AttribZooError, RuntimeError):
    """Training cannot go on; the weights are those of the last good step."""


class DataError(AttribZooError, ValueError):
    """A loader, folder or file holds nothing that can be used."""


class CheckpointError(AttribZooError, ValueError):
    """The file is not a checkpoint of this method that this version can read."""


class BackboneMismatchError(CheckpointError):
    """The checkpoint was fitted for a model with other weights."""
