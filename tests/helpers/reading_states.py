"""What scripts do with the states that a network leaves in its neurons: read them, learn from them, go on.

``same`` of the tests that use these runs each with a plain network and one that promises its states.
"""

import snntorch
import torch
from spikingjelly.activation_based import functional, neuron

STATES = ("v", "mem", "syn", "syn_exc", "syn_inh", "spk")


def neurons(model):
    kinds = (neuron.BaseNode, snntorch.SpikingNeuron)
    return [module for module in model.modules() if isinstance(module, kinds)]


def table(module):
    return module._buffers if isinstance(module, snntorch.SpikingNeuron) else module._memories


def membranes(model):
    """Every state, read as an attribute."""
    return [getattr(module, key) for module in neurons(model) for key in STATES if key in table(module)]


def detach(model):
    functional.detach_net(model)
    for module in neurons(model):
        if isinstance(module, snntorch.SpikingNeuron):
            type(module).detach(*membranes(module))  # what its `detach_hidden` does to all there are


def reset(model):
    functional.reset_net(model)
    for module in neurons(model):
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()


def reads_before_backward(model, x):
    loss = model(x).square().sum()
    found = membranes(model)
    loss.backward()
    return found + membranes(model)


def reads_after_backward(model, x):
    model(x).square().sum().backward()
    return membranes(model)


def learns_from_membranes(model, x):
    out = model(x)
    (out.sum() + sum((v * v).mean() for v in membranes(model))).backward()
    return [out]


def learns_from_one_membrane_alone(model, x):
    model(x)
    found = membranes(model)
    found[len(found) // 3].square().sum().backward()
    return membranes(model)


def reads_without_grad(model, x):
    out = model(x)
    with torch.no_grad():
        found = membranes(model)
    with torch.inference_mode():
        found += membranes(model)
    (out.sum() + found[0].sum()).backward()
    return found


def reads_under_autocast(model, x):
    with torch.autocast(x.device.type, torch.bfloat16):
        out = model(x)
        found = membranes(model)
    out.float().sum().backward()
    return found


def carries_on(model, x):
    out = model(x) + model(x.flip(0)) + model(x * 2)
    out.square().sum().backward()
    return membranes(model)


def truncates(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = []
    for part in (x, x.flip(0), x.flip(1)):
        optimizer.zero_grad()
        loss = model(part).square().sum()
        loss.backward()
        optimizer.step()
        detach(model)
        found += [loss, *membranes(model)]
    return found


def detaches_before_backward(model, x):
    loss = model(x).square().sum()
    detach(model)
    loss = loss + model(x).sum()
    loss.backward()
    return membranes(model)


def backward_never_comes(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return membranes(model)


def two_backwards(model, x):
    out = model(x)
    out.sum().backward(retain_graph=True)
    found = membranes(model)
    (out.square().sum() + found[-1].sum()).backward()
    return found


SCRIPTS = [
    reads_before_backward,
    reads_after_backward,
    learns_from_membranes,
    learns_from_one_membrane_alone,
    reads_without_grad,
    reads_under_autocast,
    carries_on,
    truncates,
    detaches_before_backward,
    backward_never_comes,
    two_backwards,
]
