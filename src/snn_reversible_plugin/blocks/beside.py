"""What a residual block gives beside its sum, and what stands there when the block runs in a chain.

The one idea: a chain computes sums and nothing else. Where a block gives a tuple, ``None`` stays ``None``,
and in the place of what was computed stands something that can be handed on and not used.

Source: the blocks of Yao et al., "Spike-driven Transformer", NeurIPS 2023 (arXiv 2307.01694), which give
their output, an attention map and a dictionary that is None in training.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, fx

# Of a tuple, without the sum that it starts with: whether each is computed, or None. None: it is no tuple.
Beside = tuple[bool, ...] | None

_TEXT = (
    "a block of a reversible chain computes its sum alone, and not what it gives beside it. Leave the "
    "block out with skip, or call unwrap_residual_blocks(model)."
)


class NotComputed:
    """Stands for a value that a chain doesn't compute; whoever looks at it gets a ``RuntimeError``.

    Example:
        >>> NotComputed().shape
        Traceback (most recent call last):
        RuntimeError: a block of a reversible chain computes its sum alone, ...
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copies, pickles and prints ask for
            raise AttributeError(name)
        raise RuntimeError(_TEXT)

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(_TEXT)

    def _refuse(self, *_args: Any) -> NoReturn:
        raise RuntimeError(_TEXT)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __abs__ = __float__ = __int__ = __index__ = _refuse
    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


def beside_in(result: tuple[Any, ...]) -> Beside:
    """What stands beside the first of a traced tuple; None where that is more than tensors and ``None``."""
    rest = result[1:]
    known = all(one is None or isinstance(one, fx.Node) for one in rest)
    return tuple(one is not None for one in rest) if known else None


def with_beside(total: Tensor, beside: Beside) -> Any:
    """What a block gives: its sum, or the tuple that starts with it."""
    return total if beside is None else (total, *(NotComputed() if one else None for one in beside))


def check_alone(others: tuple[Any, ...], label: str) -> None:
    """Refuse what a block in a chain is given beside its input.

    Raises:
        RuntimeError: one of ``others`` is not None.
    """
    if any(one is not None for one in others):
        raise RuntimeError(
            f"{label}: a block was given more than its input, and a chain has the branches that it has "
            "without. Call unwrap_residual_blocks(model)."
        )
