"""Random loops over time, in a network's forward or around it, and what users do between the steps."""

from __future__ import annotations

from fuzz.idioms import (
    BATCH,
    BETWEEN_EPOCHS,
    EDITS,
    EDITS_OF_STATES,
    GRADS,
    LOSSES,
    LOSSES_OF_A_STEP,
    OUT,
    SNNTORCH,
    SPIKINGJELLY,
    STEPS,
    SURROGATES,
    WAYS_BACK,
    WIDTH,
)
from fuzz.program import Program, Settings


def loop_program(seed: int) -> Program:
    """A network of a few layers, stepped over time."""
    program = Program(seed, Settings("memory", "stock"))
    program.settings.mode = program.pick(("memory", "speed"), "mode")
    program.settings.arithmetic = program.pick(("stock", "auto"), "arithmetic")
    program.features.add("loop program")
    loop = program.pick(("inside", "outside", "recorded"), "loop")
    program.write("class Net(nn.Module):", "    def __init__(self):", "        super().__init__()")
    layers = [_layer(program, number) for number in range(program.pick((1, 2, 2, 3)))]
    program.write(f"self.out = nn.Linear({WIDTH}, {OUT})", indent=2)
    program.write("", "    def start(self):", "        s = {}")
    for layer in layers:
        program.write(*layer.start, indent=2)
    program.write("return s", indent=2)
    program.write("", "    def one(self, x, s, t):", f"        memory = x.new_zeros({BATCH}, {WIDTH})")
    for layer in layers:
        program.write(*layer.calls, indent=2)
    program.write("return self.out(x), memory", indent=2)
    _forward(program, inside=loop == "inside")
    program.write("", "def make():", "    net = Net()")
    dtype = program.pick(("float32",) * 5 + ("float64", "bfloat16"), "dtype")
    if dtype != "float32":
        program.write(f"net = net.to(torch.{dtype})", indent=1)
    if program.maybe(0.15, "frozen parameters"):
        program.write("net.layer0.requires_grad_(False)", indent=1)
    if program.maybe(0.15, "hook on a module"):
        hook = program.pick(("lambda m, i, o: None", "lambda m, i, o: o * 2", "lambda m, i, o: o + 0.25"))
        program.write(f"net.layer0.register_forward_hook({hook})", indent=1)
    program.write("return net")
    program.lines[-1] = "    return net"
    _train(program, loop, dtype)
    return program


class _Layer:
    """One layer's lines: where states start, and what a step calls."""

    def __init__(self) -> None:
        self.start: list[str] = []
        self.calls: list[str] = []
        self.membrane = ""  # where it is, if it may be written to


def _layer(program: Program, number: int) -> _Layer:
    made = _Layer()
    kind = program.pick(("Linear", "Linear", "Linear", "Conv1d", "LinearNoBias"), "layer")
    if kind == "Conv1d":
        program.write(f"self.layer{number} = nn.Conv1d(1, 1, 3, padding=1)", indent=2)
        made.calls.append(f"c = self.layer{number}(x[:, None]).squeeze(1)")
    else:
        bias = kind == "Linear"
        program.write(f"self.layer{number} = nn.Linear({WIDTH}, {WIDTH}, bias={bias})", indent=2)
        made.calls.append(f"c = self.layer{number}(x)")
    if program.maybe(0.25, "normalization"):
        norm = program.pick(("BatchNorm1d", "LayerNorm"), "norm")
        program.write(f"self.norm{number} = nn.{norm}({WIDTH})", indent=2)
        made.calls.append(f"c = self.norm{number}(c)")
    if program.maybe(0.15, "dropout"):
        program.write(f"self.drop{number} = nn.Dropout(0.3)", indent=2)
        made.calls.append(f"c = self.drop{number}(c)")
    if program.maybe(0.3, "gain"):
        made.calls.append(
            program.pick(("c = c * 2", "c *= 2", "c += 0.5", "c = c.relu()", "c.clamp_(min=-1)"))
        )
    if program.random.random() < 0.6:
        _snntorch(program, number, made)
    else:
        _spikingjelly(program, number, made)
    _edits(program, number, made)
    made.calls.append("x = k.to(x.dtype)")
    return made


def _snntorch(program: Program, number: int, made: _Layer) -> None:
    kind = program.pick(tuple(SNNTORCH), "neuron")
    states = SNNTORCH[kind]
    settings = [f"threshold={program.pick((0.5, 1.0))}"]
    beta = program.pick((0.5, 0.8, 0.9, 0.93))
    if kind in ("Synaptic", "RSynaptic", "Alpha"):
        settings.append(f"alpha={program.pick((0.7, 0.96) if kind != 'Alpha' else (0.95, 0.97))}")
    settings.append(
        f"beta={beta}" if kind != "Lapicque" else program.pick((f"beta={beta}", "R=5.0, C=2.0"))
    )
    if kind in ("RLeaky", "RSynaptic"):
        settings.append(
            f"linear_features={WIDTH}" if program.maybe(0.5, "all to all") else "all_to_all=False"
        )
    settings.append(f'reset_mechanism="{program.pick(("subtract", "zero", "none"), "reset")}"')
    if program.maybe(0.5, "surrogate"):
        settings.append(f"spike_grad={program.pick(GRADS, 'surrogate')}")
    for name in ("learn_beta", "learn_threshold"):
        if program.maybe(0.25, name):
            settings.append(f"{name}=True")
    if kind == "Leaky" and program.maybe(0.1, "graded spikes"):
        settings.append("graded_spikes_factor=0.7, learn_graded_spikes_factor=True")
    if kind != "Alpha" and program.maybe(0.15, "reset without delay"):
        settings.append("reset_delay=False")
    hidden = program.maybe(0.35, "init_hidden")
    if hidden:
        settings.append("init_hidden=True, output=True")
    name = f"self.lif{number}"
    program.write(f"{name} = snntorch.{kind}({', '.join(settings)})", indent=2)
    if hidden:
        made.calls += [f"k, *_, m = {name}(c)"]
        return
    keys = [f"s['{state}{number}']" for state in states]
    for key in keys:
        start = program.pick(("0 * x", "zeros", "zeros", "rand"))
        shape = f"({BATCH}, {WIDTH})"
        dtype = "dtype=self.out.weight.dtype"
        value = (
            f"torch.rand{shape}.to(self.out.weight.dtype)"
            if start == "rand"
            else f"torch.zeros({shape}, {dtype})"
        )
        made.start.append(f"{key} = {value}")
    given = ", ".join(keys)
    taken = [key for key, state in zip(keys, states, strict=True) if state != "s"]
    made.calls.append(f"k, {', '.join(taken)} = {name}(c, {given})")
    if "s" in states:
        made.calls.append(f"s['s{number}'] = k")
    made.membrane = f"s['m{number}']"
    made.calls.append(f"m = {made.membrane}")


def _spikingjelly(program: Program, number: int, made: _Layer) -> None:
    kind = program.pick(SPIKINGJELLY, "neuron")
    settings = []
    if kind != "SimpleLIFNode":
        settings.append(f"surrogate_function=surrogate.{program.pick(SURROGATES, 'surrogate')}")
        settings.append(f"detach_reset={program.pick((True, False), 'detach_reset')}")
    if kind in ("IFNode", "LIFNode", "ParametricLIFNode"):
        settings.append(f"v_threshold={program.pick((0.5, 1.0))}")
        settings.append(f"v_reset={program.pick((None, 0.0, 0.0, -0.25), 'v_reset')}")
    if kind in ("LIFNode", "ParametricLIFNode"):
        name = "tau" if kind == "LIFNode" else "init_tau"
        settings.append(
            f"{name}={program.pick((1.5, 2.0, 4.0))}, decay_input={program.pick((True, False))}"
        )
    if kind == "SimpleLIFNode":
        settings.append("tau=2.0, decay_input=True")
    program.write(f"self.lif{number} = neuron.{kind}({', '.join(settings)})", indent=2)
    made.membrane = f"self.lif{number}.v"
    made.calls += [f"k = self.lif{number}(c)", f"m = {made.membrane}"]


def _edits(program: Program, number: int, made: _Layer) -> None:
    """What users do with spikes and membranes between two neurons."""
    for _ in range(program.pick((0, 0, 1, 1, 2))):
        what = program.pick(tuple(EDITS))
        program.features.add(what)
        made.calls.append(EDITS[what])
    if made.membrane and program.random.random() < 0.25:
        what = program.pick(tuple(EDITS_OF_STATES))
        program.features.add(what)
        made.calls.append(EDITS_OF_STATES[what].replace("STATE", made.membrane))


def _forward(program: Program, inside: bool) -> None:
    if not inside:
        program.write("", "    def forward(self, x, s, t):", "        return self.one(x, s, t)")
        return
    program.write("", "    def forward(self, x_seq):", "        s, outs, memories = self.start(), [], []")
    program.write("for t, x in enumerate(x_seq):", "    out, memory = self.one(x, s, t)", indent=2)
    program.write("outs.append(out)", "memories.append(memory)", indent=3)
    program.write("return torch.stack(outs), torch.stack(memories)", indent=2)


def _train(program: Program, loop: str, dtype: str) -> None:
    def write(*lines: str, indent: int = 1) -> None:
        program.write(*lines, indent=indent)

    program.write("", "def train(net):")
    optimizer = program.pick(
        ("SGD(net.parameters(), lr=0.1)", "Adam(net.parameters(), lr=0.01)"), "optimizer"
    )
    write("seen = []", f"optimizer = torch.optim.{optimizer}")
    write("for epoch in range(3):")
    write(
        "torch.manual_seed(epoch)",
        f"x_seq = torch.rand({STEPS}, {BATCH}, {WIDTH}, dtype=torch.{dtype}) * 2",
        indent=2,
    )
    of_input = program.maybe(0.3, "gradient of the input")
    if of_input:
        write("x_seq.requires_grad_()", indent=2)
    write("reset(net)", indent=2)
    _between(program)
    write("optimizer.zero_grad()", "loss = 0", indent=2)
    autocast = program.maybe(0.12, "autocast")
    where = "torch.autocast('cpu', torch.bfloat16)" if autocast else "contextlib.nullcontext()"
    backward = _backward(program)
    if loop == "inside":
        write(f"with {where}:", "    outs, memories = net(x_seq)", indent=2)
        loss = program.pick(LOSSES)
        write(f"loss = {loss}", "seen += [outs.detach(), memories.detach()]", *backward, indent=2)
    else:
        truncated = program.maybe(0.25, "truncated in the loop")
        write("s = net.start()", indent=2)
        recorded = "recorded(net)" if loop == "recorded" else "contextlib.nullcontext()"
        write(f"with {recorded}:", indent=2)
        write("for t, x in enumerate(x_seq):", f"    with {where}: out, memory = net(x, s, t)", indent=3)
        write(f"loss = loss + {program.pick(LOSSES_OF_A_STEP)}", indent=4)
        write("seen += [out.detach().clone(), memory.detach().clone()]", indent=4)
        if truncated:
            write("if t % 3 == 2:", "    loss.backward()", indent=4)
            if program.maybe(0.5, "optimizer step in the loop"):
                write("optimizer.step()", "optimizer.zero_grad()", indent=5)
            write(
                "s = {key: value.detach() for key, value in s.items()}", "detach(net)", "loss = 0", indent=5
            )
        else:
            write(*backward, indent=2)
    if of_input:
        write("seen.append(x_seq.grad)", indent=2)
    write("seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]", indent=2)
    write("optimizer.step()", indent=2)
    write("return seen")


def _backward(program: Program) -> list[str]:
    what = program.pick(("backward", "backward", *WAYS_BACK))
    program.features.add(what)
    return WAYS_BACK[what]


def _between(program: Program) -> None:
    """What happens between two epochs."""
    if program.maybe(0.4, "something between epochs"):
        what = program.pick(tuple(BETWEEN_EPOCHS))
        program.features.add(what)
        program.write(BETWEEN_EPOCHS[what], indent=2)
