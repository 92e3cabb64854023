"""Training two copies of a network side by side, one stock and one converted, and comparing bits."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import differentiated


def reset(model):
    """Neuron states of either framework back to where a sequence starts."""
    from spikingjelly.activation_based import base

    for module in model.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()
        if hasattr(module, "reset_mem"):
            module.reset_mem()


def step(model, inputs, optimizer=None, autocast=None):
    """Loss, gradients and outputs of one step."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = model(*inputs)
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    torch.manual_seed(5)
    loss = sum((out.float() * torch.randn(out.shape)).sum() for out in outputs if out.requires_grad)
    loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if optimizer is not None:
        optimizer.step()
    return loss.detach(), grads, [out.detach() for out in outputs]


def assert_equal_steps(expected, actual):
    assert torch.equal(expected[0], actual[0])
    for a, b in zip(expected[1], actual[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for a, b in zip(expected[2], actual[2], strict=True):
        assert torch.equal(a, b)
    assert any(g is not None and g.abs().sum() > 0 for g in expected[1]), "the test trains nothing"


def assert_trains_like_stock(make, inputs, *, steps=2, autocast=None, **settings):
    """Returns the converted model. Random layers draw the same numbers in both."""
    torch.manual_seed(0)
    stock = make()
    converted = srp.convert_to_reversible(copy.deepcopy(stock), **settings)
    _assert_train_alike(stock, nullcontext, converted, inputs, steps, autocast)
    return converted


def assert_trains_like_autograd(make, inputs, *, steps=2, **settings):
    """The same against autograd through the converted model's own forward: what the grid promises."""
    torch.manual_seed(0)
    reference = srp.convert_to_reversible(make(), **settings)
    converted = copy.deepcopy(reference)
    _assert_train_alike(reference, lambda: differentiated(reference), converted, inputs, steps, None)
    return converted


def _assert_train_alike(reference, around, converted, inputs, steps, autocast):
    models, arounds = (reference, converted), (around, nullcontext)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    for number in range(steps):
        results = []
        for model, optimizer, around in zip(models, optimizers, arounds, strict=True):
            reset(model)
            torch.manual_seed(number)
            with around():
                results.append(step(model, inputs, optimizer, autocast))
        assert_equal_steps(*results)
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def make_fire(model: nn.Module) -> nn.Module:
    """Untrained deep networks are silent: larger norms make every layer spike."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 0.3)
    return model
