"""Pure torch on log-probs: weights, losses, metrics. Whoever imports any of it knows every loss and weighting."""

from lit_isdpo.objective import losses, on_policy, remedies, weights

__all__ = ["losses", "on_policy", "remedies", "weights"]
