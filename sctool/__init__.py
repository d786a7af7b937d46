"""sctool: adapt and control diffusion models with few parameters on a frozen backbone."""

__version__ = "0.1.0"
