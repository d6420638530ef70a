"""GPU memory for many weights at once, without torch's allocator wasting some behind each.

It asks the driver for a segment of whole 2 MiB for every tensor over 10 MiB and leaves up to 1 MiB behind it unused: 2 to 3 % of a model's
packed weights. From a large segment it cuts them side by side.
"""

from __future__ import annotations

import torch

SEGMENT = 256 << 20  # not all in one: what is unloaded later can only be given back in whole segments
ROUND = 2 << 20


def prepare(device: torch.device, nbytes: int) -> None:
    """Makes the allocator ask for segments that tensors of `nbytes` in all fit in. Does nothing where there is no room for them."""
    if device.type != "cuda" or torch.cuda.get_allocator_backend() != "native":
        return
    sizes = [SEGMENT] * (nbytes // SEGMENT) + [-(-(nbytes % SEGMENT) // ROUND) * ROUND]
    held = []
    try:
        for size in sizes:
            held.append(torch.empty(size, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:  # the host knows what to do about that
        pass
