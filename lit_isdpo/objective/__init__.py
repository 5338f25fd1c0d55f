"""Pure torch on log-probs: weights, losses, metrics."""
