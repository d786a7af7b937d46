"""What annotators that run a network share: weights, loading, batching, networks of our own."""
