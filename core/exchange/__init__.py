"""Tuners in the formats of other tools: what is read and written."""
