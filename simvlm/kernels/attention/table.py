"""The implementations of `prefix_attention`, in order of preference within each family. A new kernel is one row."""

from simvlm.kernels.dispatch import Impl

_ROOM = "simvlm.kernels.attention"
IMPLS = (
    Impl("cpp", "torch", f"{_ROOM}.cpp_cpu"),
    Impl("triton", "torch", f"{_ROOM}.triton_gpu"),  # after cpp: its interpreter would take CPU tensors too, slowly
    Impl("xla", "torch", f"{_ROOM}.xla_torch"),
    Impl("reference", "torch", f"{_ROOM}.reference"),
    Impl("cpp", "jax", f"{_ROOM}.cpp_jax"),
    Impl("pallas", "jax", f"{_ROOM}.pallas_tpu"),
    Impl("xla", "jax", f"{_ROOM}.xla"),
    Impl("cpp", "numpy", f"{_ROOM}.cpp_cpu"),
)
