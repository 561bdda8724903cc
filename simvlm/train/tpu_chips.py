"""TPU generations: what a program may use of each, per device as JAX counts them (v2, v3: a core, two to a chip).

Peak rates and links are Google's published figures, a chip's divided by its devices; `hbm_bytes` is what the compiler
of libtpu says a program may use.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation.

    Attributes:
        devices_per_chip: as JAX counts them.
        largest: chips of the largest pod.
        bf16_flops, hbm_bytes_per_s: of a device, a second.
        hbm_bytes: of a device, usable.
        link_bytes_per_s: of a device, sent over all its chip's links together, one way.
        options: for the topology's description.
    """

    devices_per_chip: int
    largest: int
    bf16_flops: float
    hbm_bytes_per_s: float
    hbm_bytes: float
    link_bytes_per_s: float
    options: tuple[tuple[str, str], ...] = ()


# fmt: off
GENERATIONS: dict[str, Generation] = {
    "v2": Generation(devices_per_chip=2, largest=256, bf16_flops=22.5e12, hbm_bytes_per_s=350e9,
                     hbm_bytes=7.48 * GIB, link_bytes_per_s=4 * 62e9 / 2),
    "v3": Generation(devices_per_chip=2, largest=1024, bf16_flops=61.5e12, hbm_bytes_per_s=450e9,
                     hbm_bytes=15.48 * GIB, link_bytes_per_s=4 * 82e9 / 2),
    "v4": Generation(devices_per_chip=1, largest=4096, bf16_flops=275e12, hbm_bytes_per_s=1228e9,
                     hbm_bytes=30.75 * GIB, link_bytes_per_s=300e9, options=(("chip_config_name", "megacore"),)),
    "v5e": Generation(devices_per_chip=1, largest=256, bf16_flops=197e12, hbm_bytes_per_s=819e9,
                      hbm_bytes=15.75 * GIB, link_bytes_per_s=200e9),
    "v5p": Generation(devices_per_chip=1, largest=8960, bf16_flops=459e12, hbm_bytes_per_s=2765e9,
                      hbm_bytes=95.74 * GIB, link_bytes_per_s=600e9),
    "v6e": Generation(devices_per_chip=1, largest=256, bf16_flops=918e12, hbm_bytes_per_s=1640e9,
                      hbm_bytes=31.25 * GIB, link_bytes_per_s=400e9),
}
# fmt: on
