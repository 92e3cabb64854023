"""What a second run reads by reference, and that it is as the first run found it.

The one idea: parameters, and the statistics of norms in evaluation, are not copied for a rebuild, so their
version counters are. Those don't see ``parameter.data = ...``. Source: autograd's check of what it saved.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class Unchanged:
    """The versions of what is read by reference in a module, at the time it is made.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> before = Unchanged(layer, "MyChain")
        >>> before.check()
        >>> with torch.no_grad():
        ...     _ = layer.bias.add_(1)
        >>> before.check()
        Traceback (most recent call last):
        ...
        RuntimeError: MyChain: bias was modified by an inplace operation after the forward ...
    """

    def __init__(self, module: nn.Module, whose: str) -> None:
        self._module, self._whose = module, whose
        names = [*module.named_parameters()]
        for where, inner in module.named_modules():
            if isinstance(inner, _NormBase) and not inner.training:
                names += [(f"{where}.{key}", value) for key, value in inner.named_buffers(recurse=False)]  # type: ignore[misc]
        self._reads = [(name, tensor, tensor._version) for name, tensor in names]

    def check(self) -> None:
        """Raise a RuntimeError if something was changed in place."""
        for name, tensor, version in self._reads:
            if tensor._version != version:
                raise RuntimeError(
                    f"{self._whose}: {name} was modified by an inplace operation after the forward "
                    f"(version {tensor._version}, was {version}), and the backward needs it to rebuild the "
                    "blocks. Call backward before the optimizer's step and before loading weights."
                )

    def same_parameters(self) -> bool:
        """Whether the module still has the parameters that it had."""
        now = {id(p) for p in self._module.parameters()}
        return all(id(tensor) in now for _, tensor, _ in self._reads if isinstance(tensor, nn.Parameter))
