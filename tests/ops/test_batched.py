"""Several gradients in one walk through the graph of a converted network."""

import copy

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp


def multi_step(node=neuron.LIFNode, **options):
    return nn.Sequential(
        nn.Linear(4, 6), node(step_mode="m", **options), nn.Linear(6, 5),
        neuron.ParametricLIFNode(step_mode="m", v_reset=None, detach_reset=True), nn.Linear(5, 2),
    )  # fmt: skip


class Loop(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.neuron = make()

    def forward(self, x_seq):
        total, states = 0, None
        for x in x_seq:
            x = self.fc(x)
            if isinstance(self.neuron, neuron.BaseNode):
                spikes = self.neuron(x)
            else:
                spikes, *states = self.neuron(x, *(states or self.neuron.reset_mem_of()))
            total = total + self.out(spikes)
        return total


def of_snntorch(kind, **options):
    def make():
        made = getattr(snntorch, kind)(beta=0.9, **options)
        states = {"Leaky": "init_leaky", "Synaptic": "init_synaptic"}[kind]

        def start():
            found = getattr(made, states)()
            return found if isinstance(found, tuple) else (found,)

        made.reset_mem_of = start
        return made

    return lambda: Loop(make)


NETS = {
    "multi-step": multi_step,
    "in chunks": lambda: multi_step(neuron.EIFNode),
    "replayed": lambda: multi_step(neuron.GatedLIFNode, T=3),
    "single-step": lambda: Loop(neuron.LIFNode),
    "another surrogate": lambda: Loop(lambda: neuron.IFNode(surrogate_function=surrogate.Erf())),
    "leaky": of_snntorch("Leaky"),
    "leaky, learned": of_snntorch("Leaky", learn_beta=True, learn_threshold=True, reset_mechanism="zero"),
    "synaptic": of_snntorch("Synaptic", alpha=0.8),
}


def gradients(net, x_seq, of_output, batched):
    functional.reset_net(net)
    out = net(x_seq)
    leaves = [x_seq, *net.parameters()]
    if batched:
        return torch.autograd.grad(out, leaves, of_output, is_grads_batched=True, allow_unused=True)
    rows = [torch.autograd.grad(out, leaves, g, retain_graph=True, allow_unused=True) for g in of_output]
    return [None if row[0] is None else torch.stack(row) for row in zip(*rows, strict=True)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_a_batch_of_gradients(name, arithmetic):
    stock = NETS[name]()
    net = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic=arithmetic)
    x_seq = (torch.rand(3, 2, 4) * 3).requires_grad_()
    of_output = torch.randn(3, *stock(x_seq).shape)
    found = gradients(net, x_seq, of_output, True)
    # Kernels round a batch of products in their own way; so do stock's.
    for batch, rows in zip(found, gradients(net, x_seq, of_output, False), strict=True):
        assert (batch is None) == (rows is None)
        if batch is not None:
            torch.testing.assert_close(batch, rows)
    if arithmetic == "stock":
        for ours, theirs in zip(found, gradients(stock, x_seq, of_output, True), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_jacobians(arithmetic, vectorize):
    stock = NETS["leaky"]()
    net = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic=arithmetic)
    x_seq = torch.rand(3, 2, 4) * 3
    found = torch.autograd.functional.jacobian(net, x_seq, vectorize=vectorize)
    expected = torch.autograd.functional.jacobian(stock, x_seq, vectorize=vectorize)
    assert found.abs().sum() > 0
    if arithmetic == "stock":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_chains_of_reversible_blocks():
    def branch():
        return nn.Sequential(neuron.LIFNode(step_mode="m"), nn.Linear(4, 4))

    chain = srp.RevSSequence([srp.RevSBlock(branch(), branch(), dim=2) for _ in range(3)], states="reset")
    x = torch.rand(3, 2, 8, requires_grad=True)
    of_output = torch.randn(3, 3, 2, 8)
    found = gradients(chain, x, of_output, True)
    for batch, rows in zip(found, gradients(chain, x, of_output, False), strict=True):
        torch.testing.assert_close(batch, rows)


class Fire(torch.autograd.Function):
    """A surrogate that function transforms can take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x > 0).float()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


NETS["leaky, transformable"] = of_snntorch("Leaky", spike_grad=Fire.apply)
TRANSFORMS = {
    "grad": lambda loss, parameters, x_seq: torch.func.grad(loss)(parameters, x_seq),
    "vjp": lambda loss, parameters, x_seq: torch.func.vjp(loss, parameters, x_seq)[1](torch.ones(()))[0],
    "jacrev": lambda loss, parameters, x_seq: torch.func.jacrev(loss)(parameters, x_seq),
    "of each sample": lambda loss, parameters, x_seq: torch.func.vmap(torch.func.grad(loss), (None, 1))(
        parameters, x_seq.unsqueeze(2)
    ),
    "call": lambda loss, parameters, x_seq: {"loss": loss(parameters, x_seq)},
}


@pytest.mark.parametrize("name", ["multi-step", "single-step", "leaky", "leaky, transformable"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_run_stock(name, transform):
    stock = NETS[name]()
    net = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")
    x_seq, results = torch.rand(3, 2, 4) * 3, []
    for model in (stock, net):

        def loss(parameters, x_seq, model=model):
            functional.reset_net(model)
            return torch.func.functional_call(model, parameters, (x_seq,)).square().sum()

        try:
            found = TRANSFORMS[transform](loss, dict(model.named_parameters()), x_seq)
        except RuntimeError as error:  # most surrogates are no functions that torch can transform
            found = {"error": torch.tensor(list(str(error).encode()))}
        results.append(found)
    assert ("error" in results[0]) == (transform != "call" and name != "leaky, transformable")
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])
