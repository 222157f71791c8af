"""How the end of memory shows itself. Nothing is imported: where memory ends, that may fail, too."""

import errno

#: How errors that are no OutOfMemoryError say that memory ran out: the CPU's allocator, CUDA and Triton, cuBLAS,
#: threads without room for a stack, libraries without room to be loaded, and C++.
_OOM_WORDS = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't start new thread",
    "failed to map segment from shared object",
    "Cannot allocate memory",
    "std::bad_alloc",
)


def is_oom(error: BaseException) -> bool:
    """Whether an exception says that memory (of the GPU or of the host) ran out."""
    if isinstance(error, MemoryError) or is_torch_oom(error):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError) and says_oom(str(error))


def is_torch_oom(error: BaseException) -> bool:
    """Whether an exception is torch's own, which is about the device."""
    return any(kind.__name__ == "OutOfMemoryError" and kind.__module__ == "torch" for kind in type(error).__mro__)


def says_oom(text: str) -> bool:
    """Whether a text, such as the last words of a process, says that memory ran out."""
    return any(word in text for word in _OOM_WORDS)
