"""The implementations of the stem's two ops, in order of preference within each family. A new kernel is one row."""

from simvlm.kernels.dispatch import Impl

_ROOM = "simvlm.kernels.stem"
BATCH_NORM_ACT = (
    Impl("cpp", "torch", f"{_ROOM}.cpp_cpu", "batch_norm_unsupported"),
    Impl("triton", "torch", f"{_ROOM}.triton_gpu", "batch_norm_unsupported"),  # after cpp, as in attention/table.py
    Impl("xla", "torch", f"{_ROOM}.xla_torch", "batch_norm_unsupported"),
    Impl("reference", "torch", f"{_ROOM}.reference", "batch_norm_unsupported"),
    Impl("cpp", "jax", f"{_ROOM}.cpp_jax", "batch_norm_unsupported"),
    Impl("xla", "jax", f"{_ROOM}.xla_batch_norm"),
    Impl("cpp", "numpy", f"{_ROOM}.cpp_cpu", "batch_norm_unsupported"),
)
EMBED_SEQUENCE = (
    Impl("cpp", "torch", f"{_ROOM}.cpp_cpu", "embed_unsupported"),
    Impl("triton", "torch", f"{_ROOM}.triton_gpu", "embed_unsupported"),
    Impl("xla", "torch", f"{_ROOM}.xla_torch", "embed_unsupported"),
    Impl("reference", "torch", f"{_ROOM}.reference", "embed_unsupported"),
    Impl("cpp", "jax", f"{_ROOM}.cpp_jax", "embed_unsupported"),
    Impl("xla", "jax", f"{_ROOM}.xla_embed"),
    Impl("cpp", "numpy", f"{_ROOM}.cpp_cpu", "embed_unsupported"),
)
