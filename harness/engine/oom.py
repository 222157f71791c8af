"""How the end of memory shows itself."""

#: How errors that are no OutOfMemoryError say that memory ran out: the CPU's allocator, CUDA and Triton, cuBLAS.
_OOM_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_oom(error: BaseException) -> bool:
    """Whether an exception says that memory (of the GPU or of the host) ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in _OOM_WORDS)
