"""Training with a network, a loss and a loader; nothing here knows of a method."""
