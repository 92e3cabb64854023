"""What calls of one neuron come to, of whichever release or class it is."""

import torch


def outcome(node, x, v=None, calls=2, multi=False, run=None):
    """Outputs, states and gradients of calls of a neuron, one after the other.

    ``multi``: of all time steps; ``run(node, x)``: another way to call it.
    """
    run = run or (at_once if multi else _step_by_step)
    node.reset()
    node.zero_grad()
    x = x.detach().clone().requires_grad_()
    if v is not None:
        v = v.detach().clone().requires_grad_()
        node.v = v
    seen = []
    for _ in range(calls):
        seen += [run(node, x), node.v]
        if isinstance(stored := getattr(node, "v_seq", None), torch.Tensor):
            seen.append(stored)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in seen]
    sum((t * w).sum().float() for t, w in zip(seen, weights, strict=True) if t.requires_grad).backward()
    return [*seen, x.grad, None if v is None else v.grad, *(p.grad for p in node.parameters())]


def at_once(node, x):
    return node(x)


def _step_by_step(node, x):
    return torch.stack([node(step) for step in x])
