"""Measures of a map: functions of a model, inputs, maps and a target; never of a method."""
