"""Which operators the tape may run a second time.

One question an operator: can its output be computed again, bit for bit, from its tensor arguments
alone, and at what price? The answer is read off the operator's schema and tags, and off a few short
lists of what schemas don't say. Source: PyTorch's ``native_functions.yaml``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch

from snn_reversible_plugin.tape.spans import RULES

aten = torch.ops.aten


class Kind(enum.Enum):
    """What an operator does, as far as running it again is concerned."""

    OPAQUE = "its result is no function of its tensor arguments, or we can't know"
    VIEW = "its result shares the storage of its first argument"
    PURE = "its result is computed from its arguments"
    NORM = "batch norm: pure, but for the running statistics that it updates in training"
    MUTATING = "it writes into an argument"


@dataclass(frozen=True, slots=True)
class Operator:
    """How the tape treats one operator.

    ``name`` is its schema's, without the underscore of one that works in place. ``work`` is 1 for
    convolutions and matrix products. ``mutated`` lists the positions or names of the arguments written to;
    ``inplace`` says that it is the first alone, so that the operator on a copy is a recipe. ``atomic``: on
    CUDA its result depends on the order of atomic additions. ``cheap``: a view, cast or copy. ``constant``:
    it fills a tensor like its argument with one number. ``allocates``: what it makes is often filled by
    somebody else. ``bounded``: what it gives may be whole numbers in bounds (:mod:`.tape.spans`).
    """

    kind: Kind
    name: str
    work: int = 0
    mutated: tuple[int | str, ...] = ()
    inplace: bool = False
    binary: bool = False
    atomic: bool = False
    cheap: bool = False
    constant: bool = False
    allocates: bool = False
    bounded: bool = False


_WORK = frozenset(
    [
        "convolution",
        "_convolution",
        "mkldnn_convolution",
        "cudnn_convolution",
        "miopen_convolution",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addbmm",
        "addmv",
        "mv",
        "addr",
        "dot",
        "vdot",
        "linear",
        "mkldnn_linear",
        "_addmm_activation",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "slow_conv3d_forward",
        "_slow_conv2d_forward",
        "conv_depthwise3d",
        "_conv_depthwise2d",
    ]
)
_NORMS = frozenset(["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
_ATOMIC = frozenset(
    [
        "index_add",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "index_put",
        "_index_put_impl",
        "index_reduce",
        "index_copy",
        "put",
        "bincount",
        "histc",
        "cumsum",
        "embedding_bag",
        "_embedding_bag",
        "segment_reduce",
    ]
)
_OPAQUE = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "empty_permuted",
        "new_empty",
        "new_empty_strided",
        "lift",
        "lift_fresh",
        "_cudnn_rnn",
        "miopen_rnn",
        "mkldnn_rnn_layer",  # gives its workspace only where a gradient is recorded
        "resize",
        "record_stream",
        "set",
    ]
)

# Inside an autograd function these often make room for a kernel that torch doesn't see: cupy's, numpy's.
_ALLOCATE = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "clone",
    ]
)

_operators: dict[Any, Operator] = {}


def operator_of(func: Any) -> Operator:
    """What is known of an ``OpOverload``, read off once for each."""
    operator = _operators.get(func)
    if operator is None:
        operator = _operators[func] = _read_off(func)
    return operator


def _read_off(func: Any) -> Operator:
    schema = func._schema
    name = schema.name.partition("::")[2].rstrip("_")
    mutated = tuple(
        arg.name if arg.kwarg_only else position
        for position, arg in enumerate(schema.arguments)
        if (arg.alias_info is not None and arg.alias_info.is_write)
        # Collectives write to tensors, and their schemas don't say so.
        or (func.namespace == "c10d" and "Tensor" in str(arg.type))
    )
    replayable = (
        func.namespace == "aten"
        and name not in _OPAQUE
        and torch.Tag.nondeterministic_seeded not in func.tags
    )
    work, atomic, binary = int(name in _WORK), name in _ATOMIC, name == "bernoulli"
    if mutated:
        # The second return of an operator like `_native_batch_norm_legit` is no alias of the first.
        inplace = replayable and mutated == (0,) and len(schema.returns) == 1
        return Operator(Kind.MUTATING, name, work, mutated, inplace, binary, atomic)
    if not replayable:
        return Operator(Kind.OPAQUE, name, binary=binary)
    if name in _NORMS:
        return Operator(Kind.NORM, name)
    if any(ret.alias_info is not None for ret in schema.returns):
        return Operator(Kind.VIEW, name, cheap=True)
    constant = func in (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
    cheap, allocates = name in ("_to_copy", "clone"), name in _ALLOCATE
    return Operator(
        Kind.PURE, name, work, atomic=atomic, cheap=cheap, constant=constant, allocates=allocates,
        bounded=name in RULES,
    )  # fmt: skip
