"""Where tuners act on a denoiser: skips, layers and inputs, one wiring of hooks, the hint channel, attaching."""
