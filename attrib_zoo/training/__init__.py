"""Knows a network, a loss and a loader; never a method."""
