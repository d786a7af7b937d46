"""Training with less memory: what a frozen layer keeps for backward, what is computed again, and the levels of both."""
