"""Frozen bases: where they lie, loading, their families and known architectures."""
