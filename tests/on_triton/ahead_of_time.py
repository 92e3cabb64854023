"""Kernels compiled for GPUs on a machine without one, from the launches that the forms really make.

The one idea: what a form hands to a kernel is caught in place of the launch, and compiled as Triton would
compile it at that launch. Then its instructions are read.
"""

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    DUMP = knobs.nvidia.cuobjdump.path
except (ImportError, AttributeError, RuntimeError) as error:
    pytest.skip(f"this Triton compiles no kernel ahead of time: {error}", allow_module_level=True)

from snn_reversible_plugin.grid import decays
from snn_reversible_plugin.grid.step import Record, Undo
from snn_reversible_plugin.grid.step import on_triton as steps
from snn_reversible_plugin.neurons.integrate_fire import on_triton as sequences
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, Order, Rule
from snn_reversible_plugin.ops.bits import on_triton as bits
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd

CAPABILITIES = [80, 89, 90]
N, T = 4096, 4  # neurons and steps, unless a test says otherwise
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel, and what it was launched with."""

    kernel: Any
    arguments: dict[str, Any]
    fusion: bool

    def compiled(self, capability: int) -> Any:
        """What Triton makes of it: numbers that are 1, and what is None, are constants there."""
        signature, constants, attributes = {}, {}, {}
        for place, (name, parameter) in enumerate(inspect.signature(self.kernel.fn).parameters.items()):
            value = self.arguments[name]
            constant = "constexpr" in str(parameter.annotation)
            if constant or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], aligned = TYPES[value.dtype], value.data_ptr() % 16 == 0
            else:
                whole = "i64" if isinstance(value, int) and value >= 2**31 else "i32"
                signature[name] = "fp32" if isinstance(value, float) else whole
                aligned = not isinstance(value, float) and value % 16 == 0
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        return triton.compile(
            ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": self.fusion},
        )


class Allocations(TorchDispatchMode):
    """Nothing but new tensors and views of tensors: no value is asked for, and no kernel of torch runs."""

    ALLOWED = ("empty", "empty_like", "view", "detach", "unbind", "zeros", "slice")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ in self.ALLOWED, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of a test, which are made on CPU tensors and never run."""
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert len(grid) == 1 and grid[0] > 0
        fusion = kwargs.pop("enable_fp_fusion", True)
        found.append(Launch(kernel, kernel.signature.bind(*args, **kwargs).arguments, fusion))

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def instructions(compiled: Any) -> Counter[str]:
    """How often each operation on floats stands in the code."""
    code = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z0-9]+(?:\.[a-z0-9]+)+)\s", compiled.asm["ptx"], re.M)
    return Counter(one for one in code if re.search(r"\.f(16|32|64)", one) and not one.startswith("mov"))


def check_resources(compiled: Any) -> int:
    """Nothing is spilled from registers to memory. How many registers a thread has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [DUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1])


# Bits.


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bits(launches, capability):
    for dtype, each in ((torch.float32, 1), (torch.bool, 1), (torch.bfloat16, 3), (torch.int64, 4)):
        with Allocations():
            flat = torch.empty(N, dtype=dtype)
            bits.unpack_bits(bits.pack_bits(flat, each), flat, each)
    assert len(launches) == 8
    for launch in launches[:: 1 if capability == 90 else 3]:
        check_resources(launch.compiled(capability))


# Steps on the grid.


def step_of(reset: str, beta: Any, theta: Any, radix: int) -> decays.Step:
    return decays.Step(decays.Decay(beta, None, None, None, radix, False), theta, reset, 2.0**16)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def steps_there_and_back(reset: str, radix: int, beta: Any, theta: Any) -> None:
    step, u, x = step_of(reset, beta, theta, radix), floats(N), floats(N)
    before = None if reset == decays.NONE else torch.empty((N + 7) // 8, dtype=torch.uint8)
    pieces, _, _ = steps.charge(u, x, before, step, Record(), floats(N), (theta, False, floats(N)))
    record = pieces[0] if pieces else torch.empty(0, dtype=torch.uint8)
    steps.undo(u, x, before, step, record)


def at_once_there_and_back(to: float | None, radix: int, beta: Any, theta: Any) -> None:
    step, u, x = step_of(decays.NONE, beta, theta, radix), floats(N), floats(N)
    digits, planes, _, fired = steps.charge_and_reset(
        u, x, step, to, Record(), (None, floats(N)), (theta, True, floats(N))
    )
    nothing = torch.empty(0, dtype=torch.uint8)
    lost = (digits or [nothing])[0], (planes or [nothing])[0]
    steps.undo_charge_and_reset(u, x, fired, step, to, lost)


def check_integers(launch: Launch, capability: int) -> None:
    """No double precision, nothing spilled, and nothing fused but in the library's exponentials."""
    assert not launch.fusion
    compiled = launch.compiled(capability)
    found = instructions(compiled)
    assert not any("f64" in one for one in found), found
    exponentials = sum(times for one, times in found.items() if one.startswith("ex2"))
    assert sum(found[one] for one in found if one.startswith(("fma", "mad"))) == 4 * exponentials, found
    assert sum(found[one] for one in found if "ftz" in one) == 6 * exponentials, found
    check_resources(compiled)


@pytest.mark.parametrize("reset", [decays.NONE, decays.SUBTRACT, decays.BEFORE, decays.AFTER])
def test_steps_of_every_reset(launches, reset):
    with Allocations():
        steps_there_and_back(reset, 2, floats(), floats(N))
        steps_there_and_back(reset, 9, floats(N), 1.0)
    assert len(launches) == 4
    for launch in launches:
        check_integers(launch, 80)


@pytest.mark.parametrize("to", [None, 0.25])
def test_steps_with_a_reset_at_once(launches, to):
    with Allocations():
        at_once_there_and_back(to, 1, 1.0, 1.0)
        at_once_there_and_back(to, 2, floats(N), floats(N))
    assert len(launches) == 4
    for launch in launches:
        check_integers(launch, 80)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_a_step(launches, capability):
    with Allocations():
        steps_there_and_back(decays.AFTER, 2, floats(), floats())
        at_once_there_and_back(0.0, 2, 0.9, 1.0)
        steps.gate(floats(N), floats(), torch.empty(N // 8, dtype=torch.uint8), floats(N))
        steps.add_past_reset(floats(N), 1.0, floats(N), floats(N))
        steps.add_through_reset(floats(N), 1.0, 0.0, floats(N), floats(N))
        spikes, planes = floats(N), torch.empty(3 * N, dtype=torch.uint8)
        fired = steps.fire(floats(N), 1.0, True, spikes)
        steps.reset(floats(N), spikes, 1.0, 0.0, 2.0**16, True, floats(N))
        steps.unreset(floats(N), fired, 1.0, 0.0, 2.0**16, planes)
        for name in steps._FORMULAS:
            parameter = "slope" if name.endswith("sigmoid") else "alpha"
            steps.in_one_pass(name, {parameter: 2.0})(floats(N), 1.0, floats(N), floats(N))
        known, rule = as_autograd(surrogate.ATan()), Rule(None, False, 1.0, 0.25, False)
        given, made = (floats(N), floats(1)), (floats(N), floats(N))
        steps.gradient(floats(N), given, rule, known, (floats(), 0.5), made)
        for current in (floats(N), None):
            before, step = None if current is None else floats(N), step_of(decays.NONE, floats(), 1.0, 2)
            undo = Undo(step, fired, planes, fired, current, before)
            steps.gradient(floats(N), given, rule, known, (floats(), 0.5), made, undo)
    assert len(launches) == 10 + 10 + 3
    for launch in launches[2:]:
        # A comparison has nothing to fuse.
        check_integers(launch._replace(fusion=False), capability)


@pytest.mark.parametrize("name", ["Sigmoid", "Erf"])
def test_a_step_undone_with_its_gradient_by_surrogate(launches, name):
    """Few enough registers for half of a multiprocessor's threads, 65,536 registers for 1,024."""
    with Allocations():
        known, rule = as_autograd(getattr(surrogate, name)()), Rule(None, False, 1.0, 0.25, False)
        given, made = (floats(N), floats(N)), (floats(N), floats(N))
        fired, planes = torch.empty(N // 8, dtype=torch.uint8), torch.empty(3 * N, dtype=torch.uint8)
        undo = Undo(step_of(decays.NONE, floats(), 1.0, 2), fired, planes, fired, floats(N), floats(N))
        steps.gradient(floats(N), given, rule, known, (floats(), 0.5), made, undo)
    (launch,) = launches
    compiled = launch.compiled(90)
    assert not any("f64" in one for one in instructions(compiled))
    assert check_resources(compiled) <= 64


# Sequences.


def sequence(
    kind: str, surrogate: str, v_reset: float | None = 0.25, dtype: torch.dtype = torch.float32
) -> Rule:
    rule = Rule(1.7 if kind == "lif" else None, True, 0.8, v_reset, False)
    q = floats() if kind == "plif" else None
    with Allocations():
        x, v = floats(T, N, dtype=dtype), floats(N)
        made = sequences.Made(floats(T, N, dtype=dtype), floats(N))
        sequences.forward(x, v, rule, q, made)
        given = sequences.Given(floats(T, N, dtype=dtype), floats(N))
        wanted = sequences.Wanted(floats(T, N, dtype=dtype), floats(N), None if q is None else floats(N))
        sequences.backward(x, v, rule, q, (surrogate, 2.0), given, wanted)
    return rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sequences(launches, capability, dtype):
    sequence("plif", "Sigmoid", dtype=dtype)
    forward, backward = launches
    for launch in (forward, backward):
        assert not launch.fusion
        compiled = launch.compiled(capability)
        assert not any("f64" in one or one.startswith("fma") for one in instructions(compiled))
        # What becomes half precision is rounded to the nearest.
        cast = re.findall(r"cvt\.(\w+)\.(?:satfinite\.)?b?f16(?:x2)?\.f32", compiled.asm["ptx"])
        assert set(cast) <= {"rn"} and (dtype is torch.float32 or launch is forward or cast)
        check_resources(compiled)


OF_AUTOGRAD = [
    (
        "Sigmoid",
        Rule(1.7, True, 0.8, 0.25, False, Order(v_reset_first=True, v_seq_last=True)),
        False,
        False,
    ),
    ("SoftSign", Rule(1.7, False, 0.8, None, True, Order(scales=True, selects=True)), False, True),
    ("ATan", Rule(None, True, 0.8, -0.3, False, Order(reset_together=True)), True, True),
]


def sequence_as_autograd(name: str, rule: Rule, learns: bool, dtype: torch.dtype = torch.float32) -> None:
    neuron = Neuron(rule, as_autograd(getattr(surrogate, name)()), floats() if learns else None)
    with Allocations():
        x, v = floats(T, N, dtype=dtype), floats(N)
        made = sequences.Made(floats(T, N, dtype=dtype), floats(N), floats(T, N))
        sequences.forward(x, v, rule, neuron.q, made)
        given = sequences.Given(floats(T, N, dtype=dtype), floats(N), floats(T, N))
        start = (floats(N), floats(T, N) if learns else None, floats(N), floats(N))
        wanted = sequences.Wanted(floats(T, N, dtype=dtype), *start)
        sequences.backward_as_autograd(x, v, neuron, given, wanted)


@pytest.mark.parametrize(("name", "rule", "learns", "divides"), OF_AUTOGRAD, ids=["LIF", "kept", "PLIF"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sequences_as_autograd(launches, monkeypatch, capability, name, rule, learns, divides):
    monkeypatch.setattr(sequences, "divides", lambda _: divides)
    sequence_as_autograd(name, rule, learns)
    assert len(launches) == 2
    for launch in launches:
        check_integers(launch, capability)
    divisions = sum(
        times for one, times in instructions(launches[0].compiled(capability)).items() if "div" in one
    )
    assert not divisions


IN_HALF = [*OF_AUTOGRAD, ("Erf", Rule(None, False, 0.8, 0.25, False, Order(selects=True)), False, False)]


@pytest.mark.parametrize("case", IN_HALF, ids=["LIF", "kept", "PLIF", "IF"])
@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float16), (90, torch.bfloat16)])
def test_sequences_as_autograd_in_half_precision(launches, monkeypatch, capability, dtype, case):
    name, rule, learns, divides = case
    monkeypatch.setattr(sequences, "divides", lambda _: divides)
    sequence_as_autograd(name, rule, learns, dtype)
    _, backward = launches
    check_integers(backward, capability)
    compiled = backward.compiled(capability)
    assert check_resources(compiled) <= 64
    cast = re.findall(r"cvt\.(\w+)\.(?:satfinite\.)?b?f16(?:x2)?\.f32", compiled.asm["ptx"])
    assert set(cast) == {"rn"}


@pytest.mark.parametrize(("neurons", "times"), [(1, 1), (9, 1), (2**31 + 8, 3)])
def test_a_size_of_one_is_a_constant_and_large_ones_take_more_bits(launches, monkeypatch, neurons, times):
    monkeypatch.setitem(globals(), "N", neurons)
    monkeypatch.setitem(globals(), "T", times)
    with torch.device("meta"):
        for reset in (decays.SUBTRACT, decays.AFTER):
            steps_there_and_back(reset, 9, floats(N), floats(N))
        at_once_there_and_back(0.0, 2, floats(N), floats(N))
        for kind in ("if", "lif", "plif"):
            sequence(kind, "ATan", dtype=torch.float16)
        flat = floats(N)
        bits.unpack_bits(bits.pack_bits(flat), flat)
    assert len(launches) == 6 + 6 + 2
    for launch in launches:
        compiled = launch.compiled(80)
        if neurons > 2**31:
            check_resources(compiled)


NAMES = ["Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf"]
CASES = [("lif", name, 0.25) for name in NAMES] + [
    (kind, "ATan", v_reset) for kind, v_reset in (("lif", None), ("if", 0.25), ("if", None), ("plif", 0.25))
]


def stock(kind: str, surrogate: str, rule: Rule) -> None:
    """The launches of stock's own kernels, with the same numbers."""
    module = pytest.importorskip(f"spikingjelly._ops.{'if_' if kind == 'if' else kind}.triton")
    if not hasattr(module, "_forward_kernel"):
        pytest.skip("this SpikingJelly has other kernels")
    decay = () if kind == "if" else (rule.decay_input,)
    leak = {"if": (), "lif": (rule.tau,), "plif": (floats(),)}[kind]
    soft, to = rule.v_reset is None, rule.v_reset or 0.0
    x, v, gradients = floats(T, N), floats(N), [floats(T, N), floats(N)]
    numbers = (T, N, *leak, rule.v_threshold, to)
    pointers = [floats(T, N), floats(T, N), floats(N)]
    if kind == "plif":
        pointers = [x, v, *pointers, floats(N)]
    unroll = (1,) if kind == "lif" else ()
    flags = (rule.detach_reset, NAMES.index(surrogate), False, *unroll, 256, None)
    module._forward_kernel[(1,)](
        x, v, floats(T, N), floats(N), floats(T, N), *numbers, *decay, soft, False, 256, None,
        enable_fp_fusion=False,
    )  # fmt: skip
    module._backward_kernel[(1,)](
        *gradients, *pointers, *numbers, 2.0, *decay, soft, *flags, enable_fp_fusion=False
    )


@pytest.mark.parametrize(("kind", "surrogate", "v_reset"), CASES)
def test_sequences_round_as_often_and_in_the_same_way_as_stock(launches, kind, surrogate, v_reset):
    """Ours there is stock's there, and ours back is stock's there and back: the charge is done again."""
    stock(kind, surrogate, sequence(kind, surrogate, v_reset))
    compiled = [launch.compiled(80) for launch in launches]
    assert all(check_resources(one) <= 64 for one in compiled[:2])
    ours_there, ours_back, stock_there, stock_back = map(arithmetic, compiled)
    assert ours_there == stock_there
    assert ours_back == stock_there + stock_back
    # The compiler fuses nothing that is not fused here, and what divides and exponentiates is the same.
    ours, theirs = (instructions(compiled[place]).keys() | set() for place in (1, 3))
    kinds = ("fma", "mad", "div", "ex2", "rcp", "sqrt")
    of_charge = {one for one in instructions(compiled[2]) if one.startswith(kinds)}
    assert {one for one in ours if one.startswith(kinds)} == of_charge | {
        one for one in theirs if one.startswith(kinds)
    }
    assert ("fma.rn.f32" in ours) == (kind == "lif")


def arithmetic(compiled: Any) -> Counter[str]:
    """How often each operation that rounds stands in a kernel, before loops are unrolled."""
    names = r"arith\.(?:add|sub|mul|div|maximum|maxnum)f|math\.\w+|tt\.precise_divf"
    return Counter(re.findall(rf"= ({names}) ", compiled.asm["ttgir"]))
