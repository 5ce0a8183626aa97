"""How kernels are compiled: no contracted arithmetic, and a cache only where there is room for one."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from diloco_proto.codec import Format, digest, kernels, minifloat, passes, plain, twobit, uniform, warm_up
from diloco_proto.codec.native import FLOAT32, Kernel, kernel

# x86: vfmadd213ps and its kin; aarch64: fmla, fmls, fmadd, fnmsub
CONTRACTED = re.compile(r"\bv?fn?m(add|sub|la|ls)\w*")

KERNELS = [
    value
    for module in (uniform, minifloat, twobit, plain, passes, digest)
    for value in vars(module).values()
    if isinstance(value, Kernel)
]


def test_the_detector_finds_contraction() -> None:
    contracted = numba.njit("float32(float32, float32, float32)", fastmath=True)(lambda a, b, c: a * b + c)
    assert CONTRACTED.search(next(iter(contracted.inspect_asm().values())))


@pytest.mark.parametrize("each", KERNELS, ids=lambda k: k.__name__)
def test_no_kernel_contracts(each: Kernel) -> None:
    assembly = each.assembly()
    assert each.__name__ in assembly
    assert not CONTRACTED.search(assembly)


def test_every_format_has_its_own_loops() -> None:
    warm_up(Format)
    used = {loop for f in Format for loop in (kernels.loops_of(f).encode, kernels.loops_of(f).accumulate)}
    assert len(used) == 16  # int4 and int3 share theirs
    assert all(loop in KERNELS for loop in used)


def test_compiles_without_a_place_for_the_cache() -> None:
    namespace: dict[str, object] = {}
    exec("def double(x):\n    return x + x\n", namespace)  # has no file: numba finds no cache locator
    double = kernel(FLOAT32, FLOAT32)(namespace["double"])  # type: ignore[arg-type]
    assert double(np.float32(1.5)) == 3.0


def test_threads_share_one_compilation() -> None:
    def half(x: float) -> float:
        return x * np.float32(0.5)

    fresh = kernel(FLOAT32, FLOAT32)(half)
    with ThreadPoolExecutor(4) as pool:
        addresses = set(pool.map(lambda _: fresh.address, range(8)))
    assert len(addresses) == 1
    assert fresh(3.0) == 1.5


def test_a_wrong_kernel_fails_loudly() -> None:
    def wrong(x: float) -> float:
        return x + "1"  # type: ignore[operator]

    with pytest.raises(numba.core.errors.TypingError):
        _ = kernel(FLOAT32, FLOAT32)(wrong).address
