"""An optimizer that steps each parameter as its gradient stands, so that no two gradients wait.

The one idea: a parameter's gradient is complete when autograd has accumulated it; stepping the parameter
there and then frees the gradient before the next one comes. What stands in ``.grad`` until the step is over
has no memory and refuses to be read, so whatever else would need the gradient (clipping, a scaler, a second
backward) says so and trains nothing wrong.

Source: PyTorch's ``register_post_accumulate_grad_hook`` and its tutorial "How to save memory by fusing the
optimizer step into the backward pass".
"""

from __future__ import annotations

import gc
import operator
from collections.abc import MutableMapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from snn_reversible_plugin.modules.as_it_ran import tried

# NOTE [Who is served and who is refused]
#
# 1. The optimizer stays the user's: one object, its groups, state, schedules and checkpoints. A parameter
#    is stepped by its own `step` with groups that hold that parameter alone. That equals one step over all
#    where a step treats each parameter by itself, as those of torch.optim do but for LBFGS; of others the
#    user has to say so.
# 2. `optimizer.step()` in the user's loop stays where it is. It steps what got its gradient in another
#    way, runs the hooks of its schedule, and lets the next backward begin. A closure that it is given runs
#    first.
# 3. A second backward before it would add to a gradient that is gone: refused. So is one after a mere
#    `zero_grad`, which threw away what was used: say the loss of a generator goes through a discriminator.
#    Its gradient there steps the discriminator, and stock would have zeroed it.
# 4. Clipping by norm needs all gradients at once; GradScaler has to look at all before any is used; both
#    read `.grad` and are told. A scaler is looked for as well before the first parameter is stepped, since
#    its gradients are scaled. DistributedDataParallel and FullyShardedDataParallel (version 1) average
#    later than the hook: they are looked for, and read `.grad`, too. FSDP2 and DataParallel call the hook
#    when the sum over all devices stands, so they are served.
# 5. Looking takes a walk over all live objects, so it is done at the call and in the first backward after
#    it.
# 6. Reports run steps as if there had been none (modules.as_it_ran): gradients are freed, or read, and no
#    parameter moves.
# 7. An optimizer that loads a state has other groups afterwards: a parameter's is looked up at each step.


class StepInBackward:
    """What :func:`step_in_backward` returns: stands for the arrangement until :meth:`remove`.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> layer = torch.nn.Linear(2, 2)
        >>> arrangement = srp.step_in_backward(torch.optim.SGD(layer.parameters(), lr=0.1))
        >>> arrangement.remove()
        >>> layer(torch.rand(3, 2)).sum().backward()
        >>> layer.weight.grad.shape  # it waits for the optimizer again
        torch.Size([2, 2])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        self._optimizer = optimizer
        self._names = names
        self._looked = False
        self._stepped: set[int] = set()  # ids of parameters, since the last step of the optimizer
        self._group_of: dict[int, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        self._handles = [optimizer.register_step_pre_hook(self._end_step)]
        for parameter in self._parameters:
            self._handles += self._hooks(parameter)
            _arranged[parameter] = True

    def remove(self) -> None:
        """Gradients wait for ``optimizer.step()`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()
        for parameter in self._parameters:
            _arranged.pop(parameter, None)
        self._parameters.clear()

    def _hooks(self, parameter: Tensor) -> list[Any]:
        def before(_: Tensor) -> None:
            if parameter in tried:
                if isinstance(parameter.grad, SteppedGradient):
                    parameter.grad = None
            elif id(parameter) in self._stepped:
                self._refuse_second(parameter)

        def after(_: Tensor) -> None:
            group = self._group(parameter)
            if tried.get(parameter) or group is None:
                return
            if parameter not in tried:
                if not self._looked:
                    _refuse_who_needs_all(self._optimizer)
                    self._looked = True
                self._step(parameter, group)
                self._stepped.add(id(parameter))
            parameter.grad = SteppedGradient(parameter, self._name(parameter))

        return [parameter.register_hook(before), parameter.register_post_accumulate_grad_hook(after)]

    def _refuse_second(self, parameter: Tensor) -> None:
        if _waits(parameter):
            raise RuntimeError(
                f"a second backward reached {self._name(parameter)} before optimizer.step(): its "
                "first gradient was used and freed. Accumulation over several backwards needs "
                "gradients that wait: call remove() on what step_in_backward returned, or give one "
                "loss."
            )
        raise RuntimeError(
            f"the gradient of {self._name(parameter)} was zeroed without an optimizer.step(), but the "
            "backward had stepped it already. If another model's loss goes through this one, take its "
            "parameters' requires_grad off meanwhile; where a backward was given up, call optimizer.step() "
            "to go on from what it left; else call remove() on what step_in_backward returned."
        )

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        optimizer = self._optimizer
        step = type(optimizer).step
        groups = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            # Without the wrapper, which calls the hooks of a step over all.
            getattr(step, "__wrapped__", step)(optimizer)
        finally:
            optimizer.param_groups = groups

    def _group(self, parameter: Tensor) -> dict[str, Any] | None:
        """A parameter's group of today; None where the user took it out of the optimizer."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups) or any(map(operator.is_not, groups, self._groups)):
            self._groups = [*groups]
            self._group_of = {id(one): group for group in groups for one in group["params"]}
        return self._group_of.get(id(parameter))

    def _end_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the optimizer's own step: of a closure's backward, too, which it would run itself."""
        optimizer, closure, *others = (*args, kwargs.get("closure"))[: max(2, len(args))]
        result = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            result = (optimizer, lambda: loss, *others), {**kwargs}
            result[1].pop("closure", None)
        for parameter in self._parameters:
            if id(parameter) in self._stepped and not _waits(parameter):
                self._refuse_second(parameter)
        self._clear()
        return result

    def _clear(self) -> None:
        self._stepped.clear()
        for parameter in self._parameters:
            if isinstance(parameter.grad, SteppedGradient):
                parameter.grad = None

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), f"a parameter of shape {tuple(parameter.shape)}")


_arranged: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()


def _waits(parameter: Tensor) -> bool:
    """Whether what stands for a parameter's gradient waits for the optimizer's step."""
    return isinstance(parameter.grad, SteppedGradient) and not parameter.grad.zeroed


class SteppedGradient(Tensor):
    """Stands in ``.grad`` for a gradient that was used and freed. It has no memory, and can only be
    zeroed."""

    zeroed: bool
    _name: str

    @staticmethod
    def __new__(cls, parameter: Tensor, name: str) -> SteppedGradient:
        return torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, strides=parameter.stride(), dtype=parameter.dtype, device=parameter.device
        )

    def __init__(self, parameter: Tensor, name: str) -> None:
        self.zeroed = False
        self._name = name

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SteppedGradient(of {self._name}, used and freed)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
        gradients = [item for item in found if isinstance(item, cls)]
        name = func._schema.name.partition("::")[2]
        if name in ("zero_", "_foreach_zero_"):
            for gradient in gradients:
                gradient.zeroed = True
            rest = [item for item in found if not isinstance(item, cls)]
            if rest:
                torch._foreach_zero_(rest)
            return args[0] if name == "zero_" else None
        _refuse_to_be_read(name, gradients[0]._name if gradients else "a parameter")

    def share_memory_(self) -> Tensor:
        """There is none to share; torch's own would follow an address that is null."""
        return _refuse_to_be_read("share_memory_", self._name)


def _refuse_to_be_read(name: str, of: str) -> NoReturn:
    raise RuntimeError(
        f"{name} was asked for the gradient of {of}, which step_in_backward used and freed in the "
        "backward. Clipping by norm, GradScaler, DistributedDataParallel and whatever else reads "
        "gradients after the backward need gradients that wait: call remove() on what step_in_backward "
        "returned."
    )


def step_in_backward(
    optimizer: torch.optim.Optimizer, model: nn.Module | None = None, *, each_by_itself: bool = False
) -> StepInBackward:
    """Step each parameter in the backward, as its gradient stands, and free the gradient.

    Takes the parameters' gradients out of the peak of a training step: only one of them, instead of all,
    lives at a time. The training loop stays as it is, ``optimizer.step()`` and ``zero_grad()`` included;
    parameters and the optimizer's state are those of an ordinary step, bit for bit.

    Args:
        optimizer: any of ``torch.optim`` but ``LBFGS``, with its groups, schedules and state.
        model: only for names of parameters in messages.
        each_by_itself: says of an optimizer from elsewhere that its step treats each parameter by itself.

    Returns:
        An object whose ``remove()`` ends the arrangement.

    Raises:
        TypeError: the optimizer's step looks at all parameters at once, or may.
        RuntimeError: a parameter is in a ``DistributedDataParallel`` or ``FullyShardedDataParallel`` module
            (version 1), a ``GradScaler`` is in use, a gradient waits already, or a parameter is stepped in
            the backward already. Later, where it happens: the gradient is read after the backward
            (clipping, logging), a second backward comes before the step, or a gradient was zeroed without
            one (a generator's loss that goes through a discriminator).

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> net = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> stepping = srp.step_in_backward(optimizer, net)
        >>> before = net.weight.detach().clone()
        >>> net(torch.ones(2, 8)).sum().backward()
        >>> torch.allclose(before - net.weight, torch.tensor(0.2)), net.weight.grad
        (True, SteppedGradient(of weight, used and freed))
        >>> optimizer.step()  # stays in the loop
        >>> stepping.remove()
    """
    kind = type(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS looks at all gradients at once: it can't step in the backward. Use it as it is."
        )
    if not (each_by_itself or kind.__module__.startswith("torch.optim")):
        raise TypeError(
            f"whether a step of {kind.__module__}.{kind.__qualname__} treats each parameter by itself "
            "isn't known: pass each_by_itself=True if it does, so that no norm, counter or average spans "
            "parameters."
        )
    names = {} if model is None else {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), f"a parameter of shape {tuple(parameter.shape)}")
            if parameter in _arranged:
                raise RuntimeError(
                    f"{name} is stepped in the backward already: call remove() on what the earlier "
                    "step_in_backward returned."
                )
            if parameter.grad is not None:
                raise RuntimeError(
                    f"{name} has a gradient already: call optimizer.step() and zero_grad() before "
                    "step_in_backward, and remove() on an earlier one."
                )
    _refuse_who_needs_all(optimizer)
    return StepInBackward(optimizer, names)


def _refuse_who_needs_all(optimizer: torch.optim.Optimizer) -> None:
    """See notes 4 and 5."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for found in gc.get_objects():
        kind = type(found)
        if not str(kind.__module__).startswith("torch."):
            continue
        if kind.__name__ == "GradScaler" and found.is_enabled() and found._scale is not None:
            raise RuntimeError(
                "a GradScaler is in use: its gradients are scaled, and it looks at all of them before any "
                "is used. Train in bfloat16, which needs no scaler, or call remove() on what "
                "step_in_backward returned."
            )
        if kind.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel") and any(
            id(parameter) in stepped for parameter in found.parameters()
        ):
            raise RuntimeError(
                f"{kind.__name__} averages gradients after they were accumulated, so a step in the "
                "backward would use those of one process alone. Use torch.distributed.fsdp.fully_shard, or "
                "an ordinary optimizer.step()."
            )
