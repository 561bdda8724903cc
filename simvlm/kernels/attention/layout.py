"""`PrefixLayout`: who may look at whom, for a whole batch, in O(B) integers (docs/contract.md §1)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

BOUNDS = ("q_starts", "q_lens", "k_starts", "k_lens", "prefix_lens", "q_offsets", "image_lens")
"""The rows of `PrefixLayout.bounds`, in storage order."""

Lengths = int | Sequence[int] | np.ndarray | Any  # Any: torch or jax integers
_INT32_MAX = 2**31 - 1


def bucket(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … (powers of two and 1.5 times those) that is at least n."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PrefixLayout:
    """Query and key ranges, prefixes, offsets and image grid of a batch; made by `padded` or `packed`.

    Sequence b owns query rows `q_starts[b] … q_starts[b]+q_lens[b]-1` and looks at key rows `k_starts[b] …`. Its query
    i stands at position `p = q_offsets[b] + i` and sees key j iff `j < prefix_lens[b]` or `j <= p`.

    Attributes:
        bounds: int32[7, B], the rows named in `BOUNDS`, each also an attribute (`layout.q_lens`). numpy on the host;
            a torch tensor or jax array once moved to a device or built from device integers.
        padded_shape: (T, S) for tensors [B, T, N, H]; None for packed tensors [R, N, H].
        image_grid: (Gh, Gw) of the patches that come first in sequences with an image, or None.
        max_q_len, max_k_len: static upper bounds on the lengths, rounded up to a bucket.
        cross: the keys are another sequence than the queries' own (bidirectional, no table).
        q_rows, k_rows: storage rows that a packed tensor must have; 0 where unknown (device lengths, out of a pytree).
        keys_ascend: key ranges ascend without overlap, which gradients to k and v need.
        at_origin: no q_offsets were given, so every sequence's first query is known to stand at key 0.
    """

    bounds: Any
    padded_shape: tuple[int, int] | None
    image_grid: tuple[int, int] | None
    max_q_len: int
    max_k_len: int
    cross: bool = False
    q_rows: int = 0
    k_rows: int = 0
    keys_ascend: bool = True
    at_origin: bool = False

    def __post_init__(self) -> None:
        _register_pytrees()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling makes no new object through __init__, and may be this process's first layout."""
        self.__dict__.update(state)
        _register_pytrees()

    # One property per row of `bounds`, so that readers meet the contract's names.
    q_starts = property(lambda self: self.bounds[0], doc="int32[B]: first query row of each sequence.")
    q_lens = property(lambda self: self.bounds[1], doc="int32[B]: number of queries.")
    k_starts = property(lambda self: self.bounds[2], doc="int32[B]: first key row.")
    k_lens = property(lambda self: self.bounds[3], doc="int32[B]: number of keys.")
    prefix_lens = property(lambda self: self.bounds[4], doc="int32[B]: leading keys that every query sees.")
    q_offsets = property(lambda self: self.bounds[5], doc="int32[B]: position of the first query among the keys.")
    image_lens = property(lambda self: self.bounds[6], doc="int32[B]: Gh·Gw where an image comes first, else 0.")

    @property
    def batch(self) -> int:
        return int(self.bounds.shape[1])

    @property
    def is_padded(self) -> bool:
        return self.padded_shape is not None

    @classmethod
    def padded(
        cls,
        batch: int,
        query_len: int,
        key_len: int | None = None,
        *,
        q_lens: Lengths | None = None,
        k_lens: Lengths | None = None,
        prefix_lens: Lengths | None = None,
        q_offsets: Lengths | None = None,
        image_grid: tuple[int, int] | None = None,
        has_image: Any = None,
        cross: bool = False,
    ) -> PrefixLayout:
        """A layout for tensors `q[B, T, N, H]` and `k, v[B, S, N, H]`.

        Args:
            batch, query_len, key_len: B, T and S (S = T if None).
            q_lens, k_lens: real lengths; None: all of T, S (k_lens follows q_lens where S = T).
            prefix_lens: None for bidirectional, 0 for causal, else the number of leading keys that all see.
            q_offsets: position of the first query among the keys (the cache length when decoding).
            image_grid: (Gh, Gw) where sequences begin with Gh·Gw patches.
            has_image: bool[B], which do; None: all, when `image_grid` is given.
            cross: keys of another sequence.

        Raises:
            ValueError: a length out of range; causal or partly causal with q_lens ≠ k_lens and no q_offsets.
            TypeError: a length that is no integer.
        """
        batch, query_len = _static("batch", batch), _static("query_len", query_len)
        key_len = query_len if key_len is None else _static("key_len", key_len)
        if k_lens is None and key_len == query_len and not cross:
            k_lens = q_lens
        grid = _grid(image_grid)
        own_keys = k_lens is q_lens and key_len == query_len
        _check_rows(batch * max(query_len, key_len))
        read = _Reader(batch, q_lens, k_lens, prefix_lens, q_offsets, has_image)
        q = read.lengths("q_lens", query_len if q_lens is None else q_lens, query_len)
        k = read.lengths("k_lens", key_len if k_lens is None else k_lens, key_len)
        rows = read.move(np.arange(batch))
        seen = read.seen(q, k, key_len, prefix_lens, q_offsets, grid, has_image, cross, own_keys)
        return cls(
            bounds=read.stack(rows * query_len, q, rows * key_len, k, *seen),
            padded_shape=(query_len, key_len),
            image_grid=grid,
            max_q_len=bucket(query_len),
            max_k_len=bucket(key_len),
            cross=cross,
            at_origin=q_offsets is None,
        )

    @classmethod
    def packed(
        cls,
        q_lens: Lengths,
        k_lens: Lengths | None = None,
        *,
        k_starts: Lengths | None = None,
        prefix_lens: Lengths | None = None,
        q_offsets: Lengths | None = None,
        image_grid: tuple[int, int] | None = None,
        has_image: Any = None,
        cross: bool = False,
        max_q_len: int | None = None,
        max_k_len: int | None = None,
    ) -> PrefixLayout:
        """A layout for tensors `q[R, N, H]` and `k, v[R', N, H]` that hold the sequences end to end.

        Args:
            q_lens: number of query tokens of each sequence (an int: one sequence).
            k_lens: the same for keys (None: the queries' own).
            k_starts: first key row of each sequence (None: end to end). Ranges may overlap, as where beams share one
                encoder output, if neither k nor v needs a gradient.
            prefix_lens, q_offsets, image_grid, has_image, cross: as in `padded`.
            max_q_len, max_k_len: static upper bounds; needed for traced lengths and lengths on a device.

        Raises:
            ValueError: as `padded`, and lengths above the maxima, or on a device without maxima.
            TypeError: a length that is no integer.
        """
        grid = _grid(image_grid)
        own_keys = k_lens is None or k_lens is q_lens
        if k_lens is None:
            if cross:
                raise ValueError("PrefixLayout: k_lens must be given when cross=True, got None")
            k_lens = q_lens
        shape = tuple(getattr(q_lens, "shape", None) or np.shape(q_lens))
        if len(shape) > 1:
            raise ValueError(f"PrefixLayout: q_lens must be an integer or have rank 1, got shape {shape}")
        read = _Reader(shape[0] if shape else 1, q_lens, k_lens, k_starts, prefix_lens, q_offsets, has_image)
        if not read.on_host and (max_q_len is None or max_k_len is None):
            raise ValueError(
                "PrefixLayout: max_q_len and max_k_len must be given for traced lengths and lengths on a device"
            )
        max_q_len = None if max_q_len is None else _static("max_q_len", max_q_len)
        max_k_len = None if max_k_len is None else _static("max_k_len", max_k_len)
        q = read.lengths("q_lens", q_lens, _INT32_MAX if max_q_len is None else max_q_len)
        k = read.lengths("k_lens", k_lens, _INT32_MAX if max_k_len is None else max_k_len)
        max_q_len = int(q.max(initial=0)) if max_q_len is None else max_q_len
        max_k_len = int(k.max(initial=0)) if max_k_len is None else max_k_len
        q_ends, k_ends = q.cumsum(0), k.cumsum(0)
        starts = k_ends - k
        if k_starts is not None:
            starts = read.lengths("k_starts", k_starts, _INT32_MAX)
            k_ends = starts + k
        q_rows = k_rows = 0
        keys_ascend = True
        if read.on_host:
            q_rows, k_rows = int(q_ends.max(initial=0)), int(k_ends.max(initial=0))
            _check_rows(max(q_rows, k_rows))
            keys_ascend = bool(np.all(starts[1:] >= k_ends[:-1]))
        limit = max(max_k_len, int(k.max(initial=0))) if read.on_host else max_k_len
        seen = read.seen(q, k, limit, prefix_lens, q_offsets, grid, has_image, cross, own_keys)
        return cls(
            bounds=read.stack(q_ends - q, q, starts, k, *seen),
            padded_shape=None,
            image_grid=grid,
            max_q_len=bucket(max_q_len),
            max_k_len=bucket(max_k_len),
            cross=cross,
            q_rows=q_rows,
            k_rows=k_rows,
            keys_ascend=keys_ascend,
            at_origin=q_offsets is None,
        )

    def check_bounds(self, op: str) -> None:
        """Raises unless `bounds` are [7, B], as those of a layout made by hand may not be.

        Not asked of every layout that is made: pytrees put all manner of leaves in.
        """
        shape = tuple(self.bounds.shape)
        if len(shape) != 2 or shape[0] != len(BOUNDS):
            raise ValueError(f"{op}: layout must hold bounds of shape [{len(BOUNDS)}, B], got {list(shape)}")

    def to(self, device: Any) -> PrefixLayout:
        """This layout with its integers as a torch tensor on `device`; once a batch, before the first layer."""
        import torch

        bounds = self.bounds if isinstance(self.bounds, torch.Tensor) else torch.from_numpy(np.asarray(self.bounds))
        return dataclasses.replace(self, bounds=bounds.to(device))

    def numpy(self) -> PrefixLayout:
        """This layout with its integers in numpy on the host (waits for the device)."""
        bounds = self.bounds.cpu() if hasattr(self.bounds, "cpu") else self.bounds
        return dataclasses.replace(self, bounds=np.asarray(bounds, np.int32))

    def as_mask(self) -> np.ndarray:
        """bool[B, T, S]: who sees whom, dense, for debugging. Packed layouts: T and S are the longest lengths."""
        host = self.numpy()
        query_len, key_len = self.padded_shape or (host.q_lens.max(initial=0), host.k_lens.max(initial=0))
        i, j = np.arange(query_len)[:, None], np.arange(key_len)
        mask = np.zeros((self.batch, query_len, key_len), bool)
        for b in range(self.batch):
            sees = (j < host.prefix_lens[b]) | (j <= host.q_offsets[b] + i)
            mask[b] = sees & (i < host.q_lens[b]) & (j < host.k_lens[b])
        return mask

    def as_flex_block_mask(self, q_rows: int | None = None, k_rows: int | None = None) -> Any:
        """The same mask as a `BlockMask` of torch's FlexAttention, on the layout's device.

        Args:
            q_rows, k_rows: rows of packed storage, where they exceed the sequences'.
        """
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        bounds = torch.as_tensor(self.bounds)
        q_starts, q_lens, k_starts, k_lens, prefix_lens, q_offsets, _ = bounds.long().unbind(0)
        if self.padded_shape is not None:

            def visible_padded(b: Any, h: Any, i: Any, j: Any) -> Any:
                sees = (j < prefix_lens[b]) | (j <= q_offsets[b] + i)
                return sees & (i < q_lens[b]) & (j < k_lens[b])

            return create_block_mask(visible_padded, self.batch, None, *self.padded_shape, device=bounds.device)
        q_rows, k_rows = q_rows or self.q_rows, k_rows or self.k_rows
        owner = torch.searchsorted(
            (q_starts + q_lens).contiguous(), torch.arange(q_rows, device=bounds.device), right=True
        )

        def visible_packed(_b: Any, h: Any, row: Any, key: Any) -> Any:
            b = owner[row].clamp(max=self.batch - 1)
            i, j = row - q_starts[b], key - k_starts[b]
            sees = (j < prefix_lens[b]) | (j <= q_offsets[b] + i)
            return sees & (i < q_lens[b]) & (j >= 0) & (j < k_lens[b])

        return create_block_mask(visible_packed, None, None, q_rows, k_rows, device=bounds.device)

    def __repr__(self) -> str:
        where = getattr(self.bounds, "device", None) or "host"
        form = f"padded T×S={self.padded_shape[0]}×{self.padded_shape[1]}" if self.padded_shape else "packed"
        return (
            f"PrefixLayout({form}, B={self.batch}, max_q_len={self.max_q_len}, max_k_len={self.max_k_len}, "
            f"image_grid={self.image_grid}, cross={self.cross}, on {where})"
        )


class _Reader:
    """Reads lengths of any kind as integers [B] of one namespace, checked where that costs no synchronisation."""

    def __init__(self, batch: int, *given: Any) -> None:
        self.batch = batch
        self.namespace: Any = np
        self.device: Any = None
        for value in given:
            library = type(value).__module__.partition(".")[0]
            if library == "torch" and value.device.type != "cpu":
                self.namespace, self.device = sys.modules["torch"], value.device
            elif library in ("jax", "jaxlib") and _traced_or_remote(value):
                self.namespace = sys.modules["jax.numpy"]

    @property
    def on_host(self) -> bool:
        return self.namespace is np

    def move(self, array: Any) -> Any:
        """Host integers (or a traced or remote array already) in this reader's namespace."""
        if self.on_host:
            return array
        if self.device is not None:
            return self.namespace.as_tensor(array, device=self.device)
        return self.namespace.asarray(array)

    def array(self, name: str, value: Any, kinds: str, what: str) -> Any:
        """`value` broadcast to [B], checked for its dtype and shape."""
        on_host = self.on_host or not hasattr(value, "dtype") or isinstance(value, (np.ndarray, np.generic))
        if on_host:
            value = np.asarray(value)
            if value.size == 0:
                value = value.astype(bool if kinds == "b" else np.int64)
        kind = (
            value.dtype.kind
            if on_host
            else ("i" if "int" in str(value.dtype) else "b" if "bool" in str(value.dtype) else "f")
        )
        if kind not in kinds:
            raise TypeError(f"PrefixLayout: {name} must be {what}, got {value.dtype}")
        if tuple(value.shape) not in ((), (self.batch,)):
            raise ValueError(
                f"PrefixLayout: {name} must be a scalar or have shape ({self.batch},), got {tuple(value.shape)}"
            )
        return self.namespace.broadcast_to(self.move(value), (self.batch,))

    def lengths(self, name: str, value: Any, limit: int) -> Any:
        """int64[B], within 0 … limit where the values are on the host."""
        array = self.array(name, value, "iu", "integers")
        if not self.on_host:
            return array
        array = array.astype(np.int64)
        wrong = np.flatnonzero((array < 0) | (array > limit))
        if wrong.size:
            b = int(wrong[0])
            raise ValueError(f"PrefixLayout: {name} must lie in 0 … {limit}, got {array[b]} for sequence {b}")
        return array

    def seen(
        self,
        q: Any,
        k: Any,
        key_limit: int,
        prefix_lens: Any,
        q_offsets: Any,
        grid: tuple[int, int] | None,
        has_image: Any,
        cross: bool,
        own_keys: bool,
    ) -> tuple[Any, Any, Any]:
        """(prefix_lens, q_offsets, image_lens), each [B]."""
        if cross and not (prefix_lens is None and q_offsets is None and grid is None):
            raise ValueError(
                "PrefixLayout: prefix_lens, q_offsets and image_grid must be None when cross=True "
                "(cross-attention is bidirectional over another sequence's keys)"
            )
        prefix = k if prefix_lens is None else self.lengths("prefix_lens", prefix_lens, key_limit)
        harmless = own_keys or (self.on_host and (np.array_equal(q, k) or bool(np.all(prefix >= k))))
        if prefix_lens is not None and q_offsets is None and not harmless:
            raise ValueError(
                "PrefixLayout: q_offsets must be given for a causal or partial prefix where q_lens and k_lens differ, "
                "got None: the first query would stand at key 0 and see one key; when decoding pass the cache length"
            )
        if has_image is not None and grid is None:
            raise ValueError("PrefixLayout: image_grid must be given when has_image is, got None")
        offsets = self.lengths("q_offsets", 0 if q_offsets is None else q_offsets, _INT32_MAX // 2)
        has = self.array("has_image", True if has_image is None else has_image, "b", "bool")
        return prefix, offsets, has * (grid[0] * grid[1] if grid else 0)

    def stack(self, *rows: Any) -> Any:
        """int32[7, B]."""
        if self.on_host:
            return np.stack(rows).astype(np.int32)
        if self.device is not None:
            return self.namespace.stack([row.to(self.namespace.int32) for row in rows])
        return self.namespace.stack([row.astype("int32") for row in rows])


def _static(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
        raise ValueError(f"PrefixLayout: {name} must be an integer of at least 0, got {value!r}")
    return int(value)


def _grid(grid: Any) -> tuple[int, int] | None:
    if grid is None:
        return None
    sides = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise ValueError(f"PrefixLayout: image_grid must be (Gh, Gw), two positive integers, or None, got {grid!r}")
    if sides[0] * sides[1] > _INT32_MAX:
        raise ValueError(f"PrefixLayout: image_grid must have fewer than 2**31 patches, got {grid!r}")
    return int(sides[0]), int(sides[1])


def _check_rows(rows: int) -> None:
    if rows > _INT32_MAX:
        raise ValueError(f"PrefixLayout: storage must have fewer than 2**31 rows, got {rows}")


def _traced_or_remote(array: Any) -> bool:
    import jax

    return isinstance(array, jax.core.Tracer) or any(device.platform != "cpu" for device in array.devices())


# Lengths change with every batch; as static parts of a pytree they would compile every program anew, so q_rows and
# k_rows come out of one as 0 (unknown).
_CHANGING = ("q_rows", "k_rows")
_STATIC = tuple(field.name for field in dataclasses.fields(PrefixLayout) if field.name not in ("bounds", *_CHANGING))
_registered: set[str] = set()


def _register_pytrees() -> None:
    """Makes the layout a pytree (leaf: bounds) of each library that is loaded: no import is forced by it."""
    if sys.modules.get("jax") and "jax" not in _registered:
        _registered.add("jax")
        import jax

        jax.tree_util.register_dataclass(PrefixLayout, ["bounds"], list(_STATIC), drop_fields=_CHANGING)
    if sys.modules.get("torch") and "torch" not in _registered:
        _registered.add("torch")
        from torch.utils import _pytree

        _pytree.register_pytree_node(
            PrefixLayout,
            lambda layout: ([layout.bounds], tuple(getattr(layout, name) for name in _STATIC)),
            lambda leaves, static: PrefixLayout(*leaves, **dict(zip(_STATIC, static, strict=True))),
            serialized_type_name="simvlm.kernels.PrefixLayout",
        )
