"""Where tuners act on a denoiser, and how they are attached."""
