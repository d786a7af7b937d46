"""Distances between sets of images, and the reference images that they are measured against."""
