"""What users do in a loop over time: lines of code by name, and the sizes that they agree on."""

STEPS, BATCH, WIDTH, OUT = 6, 3, 8, 4

SNNTORCH = {
    "Leaky": ("m",),
    "Lapicque": ("m",),
    "Synaptic": ("i", "m"),
    "Alpha": ("e", "n", "m"),
    "RLeaky": ("s", "m"),
    "RSynaptic": ("s", "i", "m"),
}  # the states that a step takes and returns: spikes, synaptic currents, membrane
SPIKINGJELLY = ("IFNode", "LIFNode", "ParametricLIFNode", "QIFNode", "EIFNode", "KLIFNode", "SimpleLIFNode")
GRADS = (
    "grads.atan()",
    "grads.fast_sigmoid(slope=10)",
    "grads.triangular()",
    "grads.straight_through_estimator()",
    "grads.sigmoid()",
    "grads.heaviside()",
)
SURROGATES = ("ATan()", "Sigmoid()", "PiecewiseQuadratic()", "SoftSign()", "Erf()", "LeakyKReLU()")

# To the spikes k and the membrane m of a layer, whose input is x and whose current is c.
EDITS = {
    "residual": "k = k + x",
    "residual in place": "k += x",
    "spikes scaled in place": "k.mul_(0.5)",
    "spikes written to": "k[:, 0] = 0.5",
    "gated": "k = k * c.sigmoid()",
    "spikes detached": "k = k.detach() if t % 3 == 1 else k",
    "membrane used": "memory = memory + m",
    "membrane used in place": "memory += m",
    "membrane passed on": "k = k + 0.5 * m",
    "checkpoint": "k = k + checkpoint(torch.tanh, m, use_reentrant=False)",
    "retain_grad": "c.requires_grad and c.retain_grad()",
    "retain_grad of a membrane": "m.requires_grad and m.retain_grad()",
    "membrane squared": "k = k + m.square()",
    "hook on a tensor": "m.requires_grad and m.register_hook(lambda g: g if g is None else g * 0.5)",
    "select": "k = torch.cat([k[:, 4:], k[:, :4]], 1)",
    "where": "k = torch.where(m > 0.2, k, x)",
    "max": "k = torch.maximum(k, x)",
    "matmul": "k = k @ k.t() @ x",
    "pooled": "k = F.avg_pool1d(k[:, None], 3, 1, 1)[:, 0]",
    "no_grad look": "with torch.no_grad(): k.mean(), m.abs().max()",
    "slice write": "z = torch.zeros_like(k); z[:2] = k[:2]; k = z",
    "softmax": "k = k + c.softmax(-1)",
    "einsum": "k = torch.einsum('ni,nj->nj', k, x) / 8",
    "clone in place": "k = k.clone().add_(m.detach())",
}
EDITS_OF_STATES = {
    "state detached": "STATE = STATE.detach() if t % 3 == 1 else STATE",
    "state clamped": "STATE = STATE.clamp(-1, 2)",
    "state scaled in place": "STATE.mul_(0.75)",
    "state written to": "STATE[:, 0] = 0.25",
    "state scaled after retain_grad": "STATE.requires_grad and STATE.retain_grad(); STATE.mul_(0.75)",
    "state written through .data": "STATE.data.clamp_(-0.5, 0.5)",
    "state detached in place": "if t == 3: STATE.detach_()",
    "state replaced": "if t == 2: STATE = torch.ones_like(STATE)",
    "state rolled": "STATE = STATE.roll(1, 0)",
}
BETWEEN_EPOCHS = {
    "weights written through .data": "net.out.weight.data.mul_(0.9)",
    "weights written without a graph": "with torch.no_grad(): net.out.weight.mul_(0.9)",
    "evaluation": "net.eval() if epoch == 1 else net.train()",
    "state_dict loaded": "net.load_state_dict(copy.deepcopy(net.state_dict()))",
    "parameters clamped": "for p in net.parameters(): p.data.clamp_(-1, 1)",
    "parameters as a vector": "nn.utils.vector_to_parameters("
    "nn.utils.parameters_to_vector(net.parameters()) * 0.99, net.parameters())",
    "gradient norms clipped": "nn.utils.clip_grad_norm_(net.parameters(), 1.0)",
    "forward without a graph": "with torch.no_grad(): net.out(net.out.weight.new_ones(2, 8))",
    "unfreezing": "net.requires_grad_(True)",
    "averaged": "torch.optim.swa_utils.AveragedModel(net).update_parameters(net)",
    "copied": "copy.deepcopy(net).out(net.out.weight.new_ones(2, 8)).sum().backward()",
    "converted again": "again(net)",
    "spectral norm": "if epoch == 1: nn.utils.parametrizations.spectral_norm(net.out)",
    "weight norm": "if epoch == 1: nn.utils.parametrizations.weight_norm(net.out)",
    "another optimizer": "optimizer = torch.optim.SGD(net.parameters(), lr=0.05, foreach=False)",
    "gradients of zero": "net.zero_grad(set_to_none=False)",
    "buffers in place": "for b in net.buffers(): b.detach().mul_(1.0)",
}
LOSSES = (
    "outs.square().mean() + memories.mean()",
    "outs.square().mean()",
    "outs[-1].sum()",
    "memories[-1].sum() + outs.sum()",
    "outs.mean(0).logsumexp(-1).sum()",
    "(outs * torch.linspace(0, 1, 6)[:, None, None]).sum()",
    "outs[2].sum()",
)
LOSSES_OF_A_STEP = (
    "out.square().mean() + memory.mean()",
    "out.square().mean()",
    "(out * (t == 5)).sum()",
)
WAYS_BACK = {
    "backward": ["loss.backward()"],
    "retain_graph": ["loss.backward(retain_graph=True)", "loss.backward()"],
    "backward in a thread": ["in_thread(loss.backward)"],
    "autograd.grad": [
        "own = [p for p in net.parameters() if p.requires_grad]",
        "for p, g in zip(own, torch.autograd.grad(loss, own, allow_unused=True)): p.grad = g",
    ],
    "scaled loss": ["loss.sum().mul(3).backward()"],
}
