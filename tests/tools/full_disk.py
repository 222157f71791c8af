"""A limit on the size of files, which is to writers what a full disk is."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_file_over(n_bytes: int) -> Iterator[None]:
    """Let no file grow over so many bytes in the block.

    Python 3.11 leaves the part of a module's bytecode that fits, and no later process can import that module.
    """
    before, writes_none = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_none
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
