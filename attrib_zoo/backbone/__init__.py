"""Everything about frozen models; nothing here knows of a method."""
