"""SimVLM: fast prefix attention with learnable 2D relative positions, and the vision-language model that needs it.

Importing this package imports neither torch, jax, triton nor the compiled module; each comes with its first use.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
