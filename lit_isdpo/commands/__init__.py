"""The verbs beside Lightning's own: export, inspect, plan, precompute, and the labels of predict."""
