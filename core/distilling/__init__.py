"""Smaller students of a base: low-rank layers (ELR-Diffusion) and removed blocks (BK-SDM), and training them."""
