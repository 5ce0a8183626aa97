"""How kernels are compiled: numba, on first use, into C functions that take addresses.

A kernel is a C function of addresses and numbers, not a numba dispatcher of arrays, for three reasons: it is
compiled for one signature only, whether an array is read-only or not; it runs without the interpreter lock;
and a compiled loop can call it by its address (`call_kernel`), so that the loop over a model need not be
compiled anew for every pair of formats.

Products and sums must not be contracted, or results would differ between machines: no `fastmath` here.

Compiled code is cached on disk by numba, which looks at the time stamp of the kernel's own file only: whoever
edits a piece shared between files (here, `pieces`) must touch the files that use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import numba
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Some releases of numba have types and some have none: none are used here.
_numba: Any = numba
_cgutils: Any = cgutils
carray: Any = _numba.carray
"""carray(pointer(address), size, dtype): the array at an address, inside a kernel."""

ADDRESS: Final = types.int64
INT64: Final = types.int64
INT32: Final = types.int32
FLOAT32: Final = types.float32
FLOAT64: Final = types.float64
UINT64: Final = types.uint64

_OPTIONS: Final = {"nogil": True, "error_model": "numpy"}
_F = TypeVar("_F", bound=Callable[..., Any])


class Kernel:
    """A function compiled when it is first called, or its address first asked for.

    Where numba finds no writable place for its cache, every process compiles anew.
    """

    def __init__(self, function: Callable[..., Any], returns: Any, arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._signature = returns(*arguments)
        self._lock = threading.Lock()
        self._compiled: Any = None  # owns the machine code: must outlive every use of its address
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    @property
    def address(self) -> int:
        """Where the machine code begins."""
        return int(self._code().address)

    def assembly(self) -> str:
        """The machine code as text, for the tests that look for contracted arithmetic. Compiles anew."""
        return str(self._compile(cache=False)._library.get_asm_str())

    def __call__(self, *arguments: float) -> Any:
        return self._code().ctypes(*arguments)

    def _code(self) -> Any:
        if self._compiled is None:
            with self._lock:  # numba compiles one at a time anyway; this is so that only one result is used
                if self._compiled is None:
                    self._compiled = self._compile(cache=True)
        return self._compiled

    def _compile(self, cache: bool) -> Any:
        try:
            return _numba.cfunc(self._signature, cache=cache, **_OPTIONS)(self._function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return self._compile(cache=False)


def kernel(returns: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator: make a Kernel of a function with these numba types."""

    def decorate(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, returns, arguments)

    return decorate


def inlined(function: _F) -> _F:
    """Decorator: a piece of kernels, compiled into each of them."""
    compiled: _F = _numba.njit(inline="always", **_OPTIONS)(function)
    return compiled


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = intrinsic(function)
    return made


@_intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as the pointer that `numba.carray` takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@_intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@_intrinsic
def as_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


def _by_halves(builder: Any, lanes: Any, add: str = "fadd") -> Any:
    """The sum of a vector: the upper half is added to the lower one, until one is left."""
    i32 = ir.IntType(32)
    while (half := lanes.type.count // 2) > 0:
        index = ir.VectorType(i32, half)
        low, high = (index(list(range(first, first + half))) for first in (0, half))
        sides = (builder.shuffle_vector(lanes, lanes, half) for half in (low, high))
        lanes = getattr(builder, add)(*sides)
    return builder.extract_element(lanes, i32(0))


@_intrinsic
def mean_magnitude(typing_context: Any, address: Any, least: Any) -> Any:
    """Mean of the magnitudes of the 64 float32 at an address, those whose bits are under `least` taken for zeros.

    Each is divided by 64, then lanes j and j + 32 are added, then j and j + 16, and so on. LLVM does not
    reorder sums, so a loop would add one by one.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, words, floats = ir.IntType(32), ir.VectorType(ir.IntType(32), 64), ir.VectorType(ir.FloatType(), 64)
        zeros, unset = words([0] * 64), words(ir.Undefined)
        bits = builder.load(builder.inttoptr(args[0], words.as_pointer()), align=4)
        magnitude = builder.and_(bits, words([0x7FFFFFFF] * 64))
        floor = builder.shuffle_vector(builder.insert_element(unset, args[1], i32(0)), unset, zeros)
        kept = builder.select(builder.icmp_signed(">=", magnitude, floor), magnitude, zeros)
        return _by_halves(builder, builder.fmul(builder.bitcast(kept, floats), floats([1 / 64] * 64)))

    return types.float32(types.int64, types.int32), codegen


@_intrinsic
def squares_of_block(typing_context: Any, address: Any) -> Any:
    """The sum of the squares of the 64 float32 at an address, in float64 and by halves, as in mean_magnitude."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        floats, doubles = (ir.VectorType(t, 64) for t in (ir.FloatType(), ir.DoubleType()))
        x = builder.fpext(builder.load(builder.inttoptr(args[0], floats.as_pointer()), align=4), doubles)
        return _by_halves(builder, builder.fmul(x, x))

    return types.float64(types.int64), codegen


@_intrinsic
def squares_of_nibbles(typing_context: Any, address: Any) -> Any:
    """The sum of the squares of the 64 codes in the 32 bytes at an address: nibbles, in two's complement."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        octets, words = (ir.VectorType(ir.IntType(width), 32) for width in (8, 16))
        both = builder.zext(builder.load(builder.inttoptr(args[0], octets.as_pointer()), align=1), words)
        low, high = (builder.ashr(builder.shl(both, words([by] * 32)), words([12] * 32)) for by in (12, 8))
        squares = builder.add(builder.mul(low, low), builder.mul(high, high))
        return builder.zext(_by_halves(builder, squares, "add"), ir.IntType(64))

    return types.int64(types.int64), codegen


@_intrinsic
def stream_block(typing_context: Any, target: Any, origin: Any) -> Any:
    """Copy the 64 float32 at `origin` to `target`, both at multiples of 16 bytes, past the caches: lines that are only
    written are not read first. `fence` must follow before another thread looks."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        four = ir.VectorType(ir.FloatType(), 4)
        past = builder.module.add_metadata([ir.IntType(32)(1)])
        for line in range(0, 256, 16):
            to, at = (builder.inttoptr(builder.add(a, a.type(line)), four.as_pointer()) for a in args)
            builder.store(builder.load(at, align=16), to, align=16).set_metadata("nontemporal", past)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@_intrinsic
def fence(typing_context: Any) -> Any:
    """What was streamed is there for every thread that hears of it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@_intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address; no more than a hint."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        hint = _cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0")
        read, second_level, data = i32(0), i32(2), i32(1)
        builder.call(hint, [builder.inttoptr(args[0], byte), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@_intrinsic
def call_kernel(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call the kernel at `address` with a tuple of arguments, of exactly its types; it returns int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _cgutils.unpack_tuple(builder, args[1])
        shape = ir.FunctionType(ir.IntType(64), [value.type for value in values])
        return builder.call(builder.inttoptr(args[0], shape.as_pointer()), values)

    return types.int64(types.int64, arguments), codegen
