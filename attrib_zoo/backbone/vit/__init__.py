"""Transformers: their attention, and the pieces around it."""
