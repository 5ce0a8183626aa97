"""What tests of transfers move."""

from __future__ import annotations

import numpy as np
import pytest

from diloco_proto.codec import BLOCK


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Three frames in int4."""
    return np.random.default_rng(0).standard_normal(3 * 4096 * BLOCK, dtype=np.float32)
