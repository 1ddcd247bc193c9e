"""Transformers: their attention, and the parts around it."""
