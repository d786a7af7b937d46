"""Training: what a step sees, its objective, the loop, and what happens between steps."""
