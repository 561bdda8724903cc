"""Compiles the Triton kernels for a GPU that need not be there and prints what each one takes, as JSON lines.

    python tests/triton_resources.py --head-dim 64 --dtype bfloat16 --table

The launchers run as they are, on CPU tensors; only the launch itself is replaced by ahead-of-time compilation, so that
signature, alignment and options are those of a real call. Two batches of different lengths are launched: a kernel
that appears twice would be compiled twice on a GPU. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from simvlm.kernels import PrefixLayout
from simvlm.kernels.attention import triton_gpu

CUOBJDUMP = pathlib.Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--capability", type=int, default=90)
    options = parser.parse_args()

    target = GPUTarget("cuda", options.capability, 32)
    compiled: set[tuple[str, str]] = set()

    def compile_instead(kernel: JITFunction, *args, grid, warmup, **kwargs):
        backend = make_backend(target)
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        bound, specialization, given = create_function_from_signature(kernel.signature, kernel.params, backend)(
            *args, **kwargs
        )
        key = (kernel.__name__, str(specialization) + str(given))
        if key not in compiled:
            compiled.add(key)
            given, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, given)
            source = ASTSource(kernel, signature, constants, attributes)
            print(json.dumps(resources(kernel, triton.compile(source, target, given.__dict__))), flush=True)

    JITFunction.run = compile_instead
    for lens in ([230, 60], [200, 7, 193, 12, 1]):
        launch(lens, options)


def launch(lens: list[int], options: argparse.Namespace) -> None:
    """Forward and every gradient, on tensors of which nothing is read."""
    heads, dtype = 2, getattr(torch, options.dtype)
    prefix, has_image = [n // 2 for n in lens], [n >= 196 for n in lens]
    if options.padded:
        shape = (len(lens), max(lens))
        layout = PrefixLayout.padded(*shape, q_lens=lens, prefix_lens=prefix, image_grid=(14, 14), has_image=has_image)
    else:
        shape = (sum(lens),)
        layout = PrefixLayout.packed(lens, prefix_lens=prefix, image_grid=(14, 14), has_image=has_image)
    layout = layout.to("cpu")
    q, k, v, dout = (torch.empty(*shape, heads, options.head_dim, dtype=dtype) for _ in range(4))
    table = torch.empty(heads, 27, 27) if options.table else None
    out, lse = triton_gpu.forward(q, k, v, layout, table, 0.1)
    wanted = (True, True, True, options.table)
    triton_gpu.backward(dout, torch.empty_like(lse), q, k, v, out, lse, layout, table, 0.1, wanted)


def resources(kernel: JITFunction, binary) -> dict[str, object]:
    """Registers a thread, bytes spilled a thread, shared memory and tensor-core products of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    main()
