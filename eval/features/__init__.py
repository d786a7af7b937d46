"""Feature extractors, and which one to use."""
