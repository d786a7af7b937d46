"""Distances between sets of images, and the real images that they are measured against."""
