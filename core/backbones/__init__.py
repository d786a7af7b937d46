"""Frozen bases: finding and loading them, their families, and the shapes of well-known ones."""
