"""Random stacks of layers that take all time steps in one call, as SpikingJelly's networks are."""

from __future__ import annotations

from fuzz.chains import chain
from fuzz.program import Program, Settings

STEPS, BATCH = 4, 2
NEURONS = (
    "IFNode({common}, {levels})",
    "LIFNode({common}, {levels}, tau=2.0)",
    "LIFNode({common}, {levels}, tau=1.5, decay_input=False)",
    "ParametricLIFNode({common}, {levels})",
    "QIFNode({common})",
    "EIFNode({common})",
    "IzhikevichNode({common})",
    "KLIFNode({common})",
    "ComplementaryLIFNode(tau=2.0, step_mode='m')",
    "GatedLIFNode(T=4)",
    "PSN(T=4)",
    "SlidingPSN(k=2, step_mode='m')",
    "MaskedPSN(k=2, T=4, step_mode='m')",
    "ILIFNode(step_mode='m')",
    "TernaryIFNode(step_mode='m')",
)
SURROGATES = (
    "ATan()",
    "Sigmoid()",
    "PiecewiseQuadratic()",
    "PiecewiseExp()",
    "SoftSign()",
    "SuperSpike()",
    "Erf()",
)
EDITS = (
    ("scaled", "x = x * 0.5"),
    ("scaled in place", "x *= 0.5"),
    ("slice write", "z = torch.zeros_like(x); z[1:] = x[:-1]; x = z"),
    ("flipped in time", "x = x.flip(0)"),
    ("mixed over time", "x = x.cumsum(0)"),
    ("relu in place", "x = F.relu_(x - 0.25)"),
    ("loop over time", "x = torch.stack([y * (t + 1) for t, y in enumerate(x)])"),
    ("permuted", "x = x.transpose(-1, -2).contiguous()"),
    ("channels shuffled", "x = x.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)"),
    ("mean over time", "x = x - x.mean(0)"),
    ("padded", "x = F.pad(x[..., :-1], (0, 1))"),
    ("gelu", "x = F.gelu(x)"),
    ("one step detached", "x = torch.cat([x[:1].detach(), x[1:]])"),
    ("sigmoid gate", "x = x * x.mean((-1, -2), keepdim=True).sigmoid()"),
    ("written without a graph", "with torch.no_grad(): x.sum()"),
    ("lerp", "x = torch.lerp(x, x.roll(1, 0), 0.25)"),
    ("interpolated", "x = F.interpolate(x.flatten(0, 1), scale_factor=1).view_as(x)"),
    ("checkpoint", "x = checkpoint(torch.tanh, x, use_reentrant=False)"),
    ("fancy index", "x = x[torch.tensor([3, 1, 2, 0])]"),
)
CALLS = (
    "x = {0}(x)",
    "x = {0}(x)",
    "x = {0}(x) + x",
    "h = {0}(x); x = h * 0.5 + h.detach()",
    "h = {0}(x); x = h + 0.1 * h.square().mean()",
)


def stack_program(seed: int) -> Program:
    """A network of random blocks on images over time."""
    program = Program(seed, Settings("memory", "stock"))
    program.settings.mode = program.pick(("memory", "speed", "auto", "minimal"), "mode")
    program.settings.arithmetic = program.pick(("stock", "stock", "auto"), "arithmetic")
    program.features.add("stack program")
    channels, size = program.pick((2, 4)), 8
    program.write("class Net(nn.Module):", "    def __init__(self):", "        super().__init__()")
    calls: list[str] = []
    stack = _Stack(program, calls, channels, size)
    stack.conv(8)
    stack.neuron()
    for _ in range(program.pick((1, 2, 3, 4))):
        block = program.pick(
            (
                "residual", "pool", "convolution", "dropout", "attention", "edit", "concatenation",
                "grouped", "chain", "chain",
            ),
            "block",
        )  # fmt: skip
        getattr(stack, block)()
    features = stack.channels * stack.size * stack.size
    program.write(f"self.fc = layer.Linear({features}, 5, step_mode='m')", indent=2)
    program.write("", "    def forward(self, x):")
    program.write(*calls, indent=2)
    ending = program.pick(
        (
            "self.fc(x.flatten(2)).mean(0)",
            "self.fc(x.flatten(2))",
            "self.fc(x.flatten(2))[-1]",
            "(self.fc(x.flatten(2)), x)",
        ),
        "ending",
    )
    program.write(f"return {ending}", indent=2)
    _make_and_train(program, channels, size, pair=ending.startswith("("))
    return program


def neuron(program: Program) -> str:
    """A neuron of SpikingJelly's over all time steps."""
    surrogate = program.pick(SURROGATES, "surrogate")
    common = f"surrogate_function=surrogate.{surrogate}, step_mode='m'"
    common += f", detach_reset={program.pick((True, False))}"
    if program.maybe(0.1, "store_v_seq"):
        common += ", store_v_seq=True"
    levels = f"v_threshold={program.pick((0.5, 1.0))}, v_reset={program.pick((None, 0.0, 0.0), 'v_reset')}"
    kinds = NEURONS[:4] * 4 + NEURONS[4:]
    template = program.pick(kinds)
    program.features.add(f"neuron: {template.partition('(')[0]}")
    return "neuron." + template.format(common=common, levels=levels)


class _Stack:
    """Writes blocks, and knows the shape that they hand on."""

    def __init__(self, program: Program, calls: list[str], channels: int, size: int) -> None:
        self.program, self.calls, self.channels, self.size = program, calls, channels, size
        self.number = 0

    def _made(self, kind: str, what: str) -> str:
        self.number += 1
        name = f"self.{kind}{self.number}"
        self.program.write(f"{name} = {what}", indent=2)
        return name

    def _call(self, kind: str, what: str, of: str = "x") -> None:
        self.calls.append(f"{of} = {self._made(kind, what)}({of})")

    def conv(self, channels: int, stride: int = 1, of: str = "x") -> None:
        kernel = self.program.pick((3, 3, 1), "kernel")
        bias = self.program.pick((True, False))
        settings = f"{kernel}, stride={stride}, padding={kernel // 2}, bias={bias}, step_mode='m'"
        self._call("conv", f"layer.Conv2d({self.channels}, {channels}, {settings})", of)
        self.channels, self.size = channels, -(-self.size // stride)
        norm = self.program.pick(("BatchNorm2d",) * 3 + ("none", "GroupNorm", "tdBN"), "norm")
        if norm == "BatchNorm2d":
            self._call("norm", f"layer.BatchNorm2d({channels}, step_mode='m')", of)
        elif norm == "GroupNorm":
            self._call("norm", f"layer.GroupNorm(2, {channels}, step_mode='m')", of)
        elif norm == "tdBN":
            self._call(
                "norm",
                f"layer.ThresholdDependentBatchNorm2d(alpha=1.0, v_th=1.0, num_features={channels})",
                of,
            )

    def neuron(self, of: str = "x") -> None:
        self._call("lif", neuron(self.program), of)

    def chain(self) -> None:
        name = self._made("chain", chain(self.program, self.channels // 2, neuron))
        self.calls.append(self.program.pick(CALLS, "call of a chain").format(name))

    def convolution(self) -> None:
        at = len(self.calls)
        self.conv(self.program.pick((8, 8, 16)), self.program.pick((1, 1, 2)) if self.size > 2 else 1)
        self.neuron()
        if self.program.maybe(0.25, "checkpoint around a convolution and its neuron"):
            names = [line.removeprefix("x = ").partition("(")[0] for line in self.calls[at:]]
            part = f"nn.Sequential({', '.join(names)})"
            self.calls[at:] = [f"x = checkpoint({part}, x, use_reentrant=False)"]

    def pool(self) -> None:
        if self.size < 2:
            return
        kind = self.program.pick(("MaxPool2d(2", "AvgPool2d(2", "AdaptiveAvgPool2d(2"), "pool")
        self._call("pool", f"layer.{kind}, step_mode='m')")
        self.size = 2 if kind.startswith("Adaptive") else self.size // 2

    def dropout(self) -> None:
        self._call(
            "drop", f"layer.{self.program.pick(('Dropout', 'Dropout2d'), 'dropout')}(0.3, step_mode='m')"
        )

    def residual(self) -> None:
        order = self.program.pick(("conv first", "neuron first"), "residual")
        self.calls.append("h = x")
        channels = self.channels
        for _ in range(self.program.pick((1, 2))):
            if order == "neuron first":
                self.neuron("h")
            self.conv(channels, of="h")
            if order == "conv first":
                self.neuron("h")
        join = (
            "x = x + h",
            "h += x; x = h",
            "x = h + x",
            "x = x * (1 - h)",
            "x = x * h",
            "x = torch.maximum(x, h)",
            "h = h.mul_(0.5); x = x + h",
            "x = x.clone(); x += h",
        )
        self.calls.append(self.program.pick(join, "join"))
        if self.program.maybe(0.4, "neuron after the sum"):
            self.neuron()

    def concatenation(self) -> None:
        self.calls.append("h = x")
        channels = self.channels
        self.conv(8, of="h")
        self.neuron("h")
        self.calls.append("x = torch.cat([x, h], 2)")
        self.channels = channels + 8

    def grouped(self) -> None:
        settings = f"3, padding=1, groups={self.channels}, step_mode='m'"
        self._call("conv", f"layer.Conv2d({self.channels}, {self.channels}, {settings})")
        self.neuron()

    def attention(self) -> None:
        channels = self.channels
        self.calls.append("t = x.flatten(3).transpose(-1, -2)  # [T, N, tokens, C]")
        for name in "qkv":
            linear = self._made(name, f"layer.Linear({channels}, {channels}, step_mode='m')")
            self.calls.append(f"{name} = {linear}(t)")
            self.neuron(name)
        product = self.program.pick(
            (
                "a = (q @ k.transpose(-2, -1)) @ v * 0.125",
                "a = q @ (k.transpose(-2, -1) @ v) * 0.125",
                "a = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v",
                "a = F.scaled_dot_product_attention(q, k, v)",
            ),
            "attention",
        )
        self.calls.append(product)
        self.neuron("a")
        self.calls.append(
            f"x = x + a.transpose(-1, -2).reshape(x.shape[:2] + ({channels}, {self.size}, {self.size}))"
        )

    def edit(self) -> None:
        what, line = self.program.pick(EDITS)
        self.program.features.add(what)
        self.calls.append(line)


def _make_and_train(program: Program, channels: int, size: int, pair: bool) -> None:
    program.write("", "def make():", "    net = Net()", "    plainly(net)")
    dtype = program.pick(("float32",) * 6 + ("float64", "bfloat16"), "dtype")
    if dtype != "float32":
        program.write(f"net = net.to(torch.{dtype})", indent=1)
    if program.maybe(0.15, "channels last"):
        program.write("net = net.to(memory_format=torch.channels_last)", indent=1)
    if program.maybe(0.15, "frozen parameters"):
        program.write("net.conv1.requires_grad_(False)", indent=1)
    program.write("return net", indent=1)
    program.write("", "def train(net):", "    seen = []")
    # In mode minimal gradients are others by rounding, and so would spikes be after a step.
    rate = 0.0 if program.settings.mode == "minimal" else 0.05
    program.write(f"optimizer = torch.optim.SGD(net.parameters(), lr={rate}, momentum=0.9)", indent=1)
    program.write("for epoch in range(2):", "    torch.manual_seed(epoch)", indent=1)
    program.write(
        f"x = torch.rand({STEPS}, {BATCH}, {channels}, {size}, {size}, dtype=torch.{dtype}) * 2", indent=2
    )
    of_input = program.maybe(0.3, "gradient of the input")
    if of_input:
        program.write("x.requires_grad_()", indent=2)
    if program.maybe(0.8, "reset"):
        program.write("reset(net)", indent=2)
    else:
        program.write("functional.detach_net(net)", indent=2)
    program.write("optimizer.zero_grad()", indent=2)
    if program.maybe(0.15, "autocast"):
        program.write("with torch.autocast('cpu', torch.bfloat16): out = net(x)", indent=2)
    else:
        program.write("out = net(x)", indent=2)
    if pair:
        program.write("out, last = out", "seen.append(last.detach())", indent=2)
    backward = program.pick(
        (
            "loss.backward()",
            "loss.backward()",
            "loss.backward(retain_graph=True); loss.backward()",
            "in_thread(loss.backward)",
            "(loss + 0.1 * sum(v.square().mean() for v in membranes(net))).backward()",
        ),
    )
    program.features.add("loss of the membranes" if "membranes" in backward else backward)
    program.write(
        "loss = out.square().mean()" + (" + last.mean()" if pair else ""),
        "seen.append(out.detach())",
        backward,
        indent=2,
    )
    if of_input:
        program.write("seen.append(x.grad)", indent=2)
    program.write(
        "seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]",
        "optimizer.step()",
        indent=2,
    )
    program.write("return seen", indent=1)
