"""Feature extractors, and which one to take."""
