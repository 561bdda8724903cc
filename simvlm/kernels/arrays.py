"""What the public ops ask of an array, whichever library it comes from; imports none of them."""

from __future__ import annotations

from typing import Any


def dtype_name(x: Any) -> str:
    """ "float32" for torch.float32 and numpy's or jax's float32 alike."""
    return str(x.dtype).removeprefix("torch.")


def last_axis_contiguous(family: str, x: Any) -> bool:
    """Empty arrays count as contiguous, whatever strides they carry."""
    if family == "jax" or 0 in x.shape or x.shape[-1] == 1:
        return True
    return x.stride(-1) == 1 if family == "torch" else x.strides[-1] == x.itemsize


def strides(x: Any) -> tuple[int, ...]:
    return tuple(x.strides) if isinstance(getattr(x, "strides", None), tuple) else tuple(x.stride())


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """torch tensors in the autocast dtype where it is on for the first one's device; float64 and None as they are."""
    import torch

    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    if tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors)


def refuse_transforms(op: str, *tensors: Any) -> None:
    """Raises by name where torch would drop a tangent in silence or speak of its own insides; None is passed over."""
    import torch

    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for interpreter in functorch.get_interpreter_stack() or ():
        if interpreter.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp):
            transform = (
                "torch.func.grad or vjp" if interpreter.key() == functorch.TransformType.Grad else "torch.func.jvp"
            )
            raise NotImplementedError(
                f"{op}: {transform} is not supported by the kernels (.backward() and torch.autograd.grad are, "
                "and torch.vmap); impl='reference' supports it"
            )
    if torch.autograd.forward_ad._current_level >= 0:
        for x in tensors:
            if x is not None and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{op}: forward-mode differentiation is not supported by the kernels; impl='reference' supports it"
                )


def call_op(registered: Any, run: Any, *args: Any) -> Any:
    """registered(*args), or run(*args), which is behind it, where no gradient, transform, mode or compiler is involved.

    The registered op would cost more than a small call itself.
    """
    import torch

    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return registered(*args)
    if torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled():
        return registered(*args)
    grad = torch.is_grad_enabled()
    for x in args:
        special = isinstance(x, torch.Tensor) and (x.is_meta or type(x) not in (torch.Tensor, torch.nn.Parameter))
        if special or (grad and isinstance(x, torch.Tensor) and x.requires_grad):
            return registered(*args)
    return run(*args)


def check_saved(op: str, **arrays: tuple[Any, tuple[int, ...], Any]) -> None:
    """Raises unless each torch tensor (None is passed over) has the shape and dtype (None: any) named after it.

    What torch saves for the backward pass comes back through `torch.autograd.graph.saved_tensors_hooks`, which may be
    anybody's, and becomes addresses.
    """
    for name, (x, shape, dtype) in arrays.items():
        if x is not None and (x.shape != shape or x.dtype != (dtype or x.dtype)):
            raise ValueError(
                f"{op}: {name} must come back from saved_tensors_hooks as {dtype or x.dtype}{list(shape)}, "
                f"got {x.dtype}{list(x.shape)}"
            )
