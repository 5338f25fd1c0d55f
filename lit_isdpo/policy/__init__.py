"""Language models: loading, log-probs, the reference, generation."""
