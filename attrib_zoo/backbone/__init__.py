"""All that is known about frozen models; knows no method."""
