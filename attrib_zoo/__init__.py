"""Which image regions made the model decide? Attribution methods for image classifiers, beside Captum."""

__version__ = "0.1.0"
