"""Importance-sampled direct alignment (IS-DPO, arXiv 2506.08681) as a PyTorch Lightning research template."""

from importlib.metadata import PackageNotFoundError, version

import lit_isdpo.lab  # noqa: F401 - registers its names

try:
    __version__ = version("lit_isdpo")
except PackageNotFoundError:  # run from a folder, and not installed
    __version__ = "not installed"
