"""Triton's interpreter, without the work that it repeats or throws away: kernels give the same results, sooner."""

import math
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
        _match_sides_by_their_types(monkeypatch)
        _call_builtins_at_once(monkeypatch)
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
    most_bytes: dict[str, float] = {}
    common_types: dict[tuple[str, bool, str, bool, bool], Any] = {}
    block_types: dict[tuple[str, tuple[Any, ...]], tuple[Any, int, str]] = {}
    shapes: dict[str, tuple[Any, Any, Any]] = {}

    def numpy_type_of(tt_dtype: Any) -> Any:
        # A type's name is all that equality and hashes of types look at.
        name = tt_dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(tt_dtype)
        return numpy_types[name]

    def fits(data: Any, tt_dtype: Any) -> bool:
        name = tt_dtype.name
        if name not in most_bytes:
            is_pointer = isinstance(tt_dtype, tl.pointer_type)
            most_bytes[name] = math.inf if is_pointer else max(tt_dtype.primitive_bitwidth, 8) / 8
        return bool(data.itemsize <= most_bytes[name])

    def common_type_of(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in common_types:
            common_types[key] = common_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return common_types[key]

    def block_type_of(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(shape, "values", shape))
        if key not in block_types:
            new_block_type(self, element_ty, shape)
            block_types[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = block_types[key]

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        name = type.name
        if name not in shapes:
            new_tensor(self, handle, type)
            shapes[name] = self.numel, self.shape, self.dtype
            return
        self.handle, self.type = handle, type
        self.numel, self.shape, self.dtype = shapes[name]

    def handle_of(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if not fits(data, dtype):
            self.__post_init__()  # which says so

    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type_of)
    monkeypatch.setattr(interpreter, "_validate_np_data_size", fits)
    monkeypatch.setattr(TritonSemantic, "computation_type_impl", common_type_of)
    monkeypatch.setattr(tl.block_type, "__init__", block_type_of)
    monkeypatch.setattr(tl.tensor, "__init__", tensor_of)
    monkeypatch.setattr(interpreter.TensorHandle, "__init__", handle_of)


def _match_sides_by_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the sides of an operation one shape by what was done with two of the same types before.

    The interpreter finds out anew for each operation whether one side is to be converted, filled up or broadcast. What
    is converted, and what is refused, goes its way each time.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import TensorHandle

    match, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    tensor = tl.tensor
    known: dict[tuple[Any, ...], tuple[Any, Any] | None] = {}
    numbers = {"int32": np.dtype(np.int32), "int64": np.dtype(np.int64), "fp32": np.dtype(np.float32)}
    limits = {name: np.iinfo(numbers[name]) for name in ("int32", "int64")}

    def shaped(side: Any, found: Any, builder: Any) -> Any:
        if found is None:
            return side
        if side.type.is_block():
            return tensor(builder.create_broadcast(side.handle, list(found.shape)), found)
        return tensor(builder.create_splat(found, side.handle), found)

    def change(side: Any, found: Any) -> tuple[bool, Any]:
        """Return whether filling up or broadcasting is all that was done, and the type that it gave, None for none."""
        if found is side:
            return True, None
        has_axes = not side.type.is_block() or len(side.type.shape) == len(found.type.shape)
        return found.dtype.name == side.dtype.name and has_axes, found.type

    def as_before(semantic: Any, do: Callable[..., tuple[Any, Any]], lhs: Any, rhs: Any, *options: bool) -> Any:
        key = do, lhs.type.name, rhs.type.name, *options
        if key not in known:
            found = do(semantic, lhs, rhs, *options)
            (plain_lhs, to_lhs), (plain_rhs, to_rhs) = change(lhs, found[0]), change(rhs, found[1])
            known[key] = (to_lhs, to_rhs) if plain_lhs and plain_rhs else None
            return found
        types = known[key]
        if types is None:
            return do(semantic, lhs, rhs, *options)
        return shaped(lhs, types[0], semantic.builder), shaped(rhs, types[1], semantic.builder)

    def number(value: float, like: Any) -> Any:
        shape = like.type.shape if like.type.is_block() else 1
        # Zero has no sign here.
        return tensor(TensorHandle(np.full(shape, value or 0, numbers[like.dtype.name]), like.dtype), like.type)

    def is_usual(value: Any, like: Any, arithmetic_check: bool) -> bool:
        name = like.dtype.name
        if not arithmetic_check or name not in numbers:
            return False
        if name == "fp32":
            return type(value) is float or type(value) is int
        return type(value) is int and limits[name].min <= value <= limits[name].max

    def matched(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if type(lhs) is not tensor or type(rhs) is not tensor:
            if type(lhs) is tensor and is_usual(rhs, lhs, arithmetic_check):
                return lhs, number(rhs, lhs)
            if type(rhs) is tensor and is_usual(lhs, rhs, arithmetic_check):
                return number(lhs, rhs), rhs
            return match(self, lhs, rhs, *options)
        return as_before(self, match, lhs, rhs, *options)

    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", lambda self, *sides: as_before(self, broadcast, *sides))
    monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", matched)


def _call_builtins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand the interpreter to what is built in without a look at the arguments, which name it at no call."""
    import triton.language as tl
    from triton.runtime import interpreter

    checking, unwrap = tl.add.__code__, tl.core._unwrap_if_constexpr
    as_it_is = {tl.tensor, tl.dtype, tl.block_type, int, float, bool}

    def unwrapped(value: Any) -> Any:
        return value if type(value) in as_it_is else unwrap(value)

    def patch_attribute(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is checking:
            member = member.__wrapped__  # the check is that the interpreter is named

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return member(*arguments, **options)

        scope.set_attr(obj, name, call)

    monkeypatch.setattr(tl.core, "_unwrap_if_constexpr", unwrapped)
    monkeypatch.setattr(interpreter, "_patch_attr", patch_attribute)
