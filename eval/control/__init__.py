"""Adherence to a condition: one file per kind of condition."""
