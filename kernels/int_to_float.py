"""How products of integers become float32: by the hardware's conversion, or by a magic number.

An int32 t with |t| < 2^22 plus the bits of 1.5 * 2^23 is that float plus t, so a float difference gives t exactly: an integer addition and
a float one in place of one conversion. Both ways give the same bits.

The loader's `i2f_mode`: "enabled" is the hardware's conversion, "always" the magic number. On the one GPU where both were timed (H200,
benchmarks/int_to_float.py) the conversion makes the product 3 to 6 % faster: it runs beside the additions, which the magic number adds to.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

MODES = ("enabled", "always")
MAGIC_BITS, MAGIC = 0x4B400000, 12582912.0  # 1.5 * 2^23

_mode = "enabled"


def set_mode(mode: str) -> None:
    """Chooses for this process; the last loader counts, since no result depends on it. Raises ValueError for an unknown mode."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"i2f_mode is {mode!r}, expected one of {', '.join(MODES)}")
    if mode != _mode:
        log.debug("Integer sums become floats by the magic number %s.", "from now on" if mode == "always" else "no more")
    _mode = mode


def by_magic() -> bool:
    """Whether kernels convert by the magic number."""
    return _mode == "always"
