"""Tests, and the tools that are run by hand: ``python -m tests.tools.benchmarks``, ``faults``, ``gpu``, ``mutation``.

A package, so that no installed distribution that ships a top-level ``tests`` takes the name.
"""
