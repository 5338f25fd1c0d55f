"""A check of everything that runs on a GPU: ``python -m tests.tools.gpu``."""

import os

# Whether there is a GPU is asked of its management library: once CUDA was asked, forks could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
