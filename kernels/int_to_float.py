"""How products of integers become float32: by the hardware's conversion, or by a magic number.

An int32 t with |t| < 2^22 plus the bits of 1.5 * 2^23 is that float plus t, so a float difference gives t exactly: an integer addition and
a float one, which run at full rate where a conversion runs at a quarter of it. Both ways give the same bits.

The loader's `i2f_mode`: "enabled" takes the magic number on NVIDIA GPUs, where it was found to be no slower; "always" on every GPU.
"""

from __future__ import annotations

import logging

from .targets import Target, interpreting

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
        log.debug("Integers become floats by the magic number %s.", "everywhere" if mode == "always" else "on NVIDIA GPUs")
    _mode = mode


def by_magic(target: Target) -> bool:
    """Whether kernels for the target convert by the magic number."""
    return _mode == "always" or target.name.startswith("sm_") or interpreting()
