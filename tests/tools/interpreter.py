"""Triton's interpreter, without the work that it repeats or throws away: kernels give the same results, sooner."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Interpret kernels in less than half of the time; every result and every error stays what it is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _patch_the_language_once_a_launch(monkeypatch)
        _check_no_overflow_in_vain(monkeypatch)
        _describe_types_once(monkeypatch)
        yield


def _patch_the_language_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the functions of ``triton.language`` at the first call of a launch alone.

    The interpreter does so at every call of a helper, too, which changes nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[Any] = set()
    modules_of: dict[int, tuple[Any, set[Any]]] = {}

    def patch_once(fn: Any) -> Any:
        names = fn.__globals__
        if id(names) not in modules_of:  # kept with the names, whose id is theirs as long as they live
            seen = {module for module in (tl, tl.core) if any(value is module for value in names.values())}
            modules_of[id(names)] = names, seen
        _, seen = modules_of[id(names)]
        if seen <= patched:
            return None  # helpers do not ask
        patched.update(seen)
        return patch(fn)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)


def _check_no_overflow_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check that integers do not overflow where nothing looks at it.

    The interpreter computes each sum and product again in 64 bits, and hands it to ``device_assert``, which returns at
    once unless the options say ``debug``.
    """
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_where_it_counts(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check_where_it_counts)


def _describe_types_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is said of a type or a shape, which the interpreter works out anew for every value."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    numpy_type, common_type = interpreter._get_np_dtype, TritonSemantic.computation_type_impl
    new_block_type, new_tensor = tl.block_type.__init__, tl.tensor.__init__
    numpy_types: dict[str, Any] = {}
    common_types: dict[tuple[str, bool, str, bool, bool], Any] = {}
    block_types: dict[tuple[str, tuple[Any, ...]], tuple[Any, int, str]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def numpy_type_of(tt_dtype: Any) -> Any:
        # A type's name is all that equality and hashes of types look at.
        name = tt_dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(tt_dtype)
        return numpy_types[name]

    def common_type_of(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in common_types:
            common_types[key] = common_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return common_types[key]

    def block_type_of(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(shape)
        if key not in block_types:
            new_block_type(self, element_ty, shape)
            block_types[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = block_types[key]

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            new_tensor(self, handle, type)
            shapes[shape] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[shape]

    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type_of)
    monkeypatch.setattr(TritonSemantic, "computation_type_impl", common_type_of)
    monkeypatch.setattr(tl.block_type, "__init__", block_type_of)
    monkeypatch.setattr(tl.tensor, "__init__", tensor_of)
