"""GPUs that caches are sized for: their memory and its bandwidth, as their makers give them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory of a GPU."""

    gib: float
    """Size in GiB; a maker's GB are taken as such."""
    gb_per_second: float
    """Bandwidth in 10^9 bytes per second."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self.gib * 2**30)

    @property
    def bandwidth(self) -> float:
        """Bandwidth in bytes per second."""
        return self.gb_per_second * 1e9


GPUS = {
    "H200 (141 GB)": Gpu(141, 4800),
    "H100 SXM (80 GB)": Gpu(80, 3350),
    "A100 SXM (80 GB)": Gpu(80, 2039),
    "L40S (48 GB)": Gpu(48, 864),
    "RTX 4090 (24 GB)": Gpu(24, 1008),
    "L4 (24 GB)": Gpu(24, 300),
    "RTX 3060 (12 GB)": Gpu(12, 360),
}
