"""The nouns: backbones, sites, tuners, data, training, sampling and run folders."""
