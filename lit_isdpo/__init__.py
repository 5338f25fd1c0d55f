"""Importance-sampled direct alignment (IS-DPO, arXiv 2506.08681) as a PyTorch Lightning research template."""

from importlib.metadata import version

__version__ = version("lit_isdpo")
