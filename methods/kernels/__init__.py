"""Triton kernels, one folder an operation: ``reference`` (plain torch, the oracle), ``kernel``, README.

Nothing here imports Triton on import: ``dispatch`` says whether a kernel runs, and why not.
"""
