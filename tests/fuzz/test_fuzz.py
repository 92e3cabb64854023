"""Random training programs, stock and converted: always the same seeds here, others in ``make fuzz``."""

import pytest
import torch

pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly.activation_based")
from fuzz.__main__ import program_of
from fuzz.compare import REFUSED, SAME, shortened, verdict
from fuzz.program import Program, Settings, script

PROGRAMS, AT_ONCE = 160, 20


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("first", range(0, PROGRAMS, AT_ONCE))
def test_programs_train_converted_as_they_do_stock(first):
    refused = 0
    for seed in range(first, first + AT_ONCE):
        program = program_of(seed)
        found = verdict(program.source, program.settings)
        refused += found.startswith(REFUSED)
        if found != SAME and not found.startswith(REFUSED):
            short = shortened(program.source, program.settings)
            pytest.fail(f"{found}\n{script(short, program.settings, seed)}", pytrace=False)
    assert refused <= AT_ONCE / 3, "too few programs run"


def test_the_same_seed_writes_the_same_program():
    assert program_of(11).source == program_of(11).source != program_of(13).source


WRONG = """\
def make():
    return nn.Sequential(nn.Linear(2, 2), neuron.IFNode())

def train(net):
    seen = [torch.ones(1)]
    unneeded = 3
    if isinstance(net, srp.convert.Recorded):
        seen[0] += 1
    return seen
"""


def test_a_difference_is_found_and_the_program_made_shorter():
    settings = Settings("memory", "stock")
    assert verdict(WRONG, settings) == "differs: result 0 of 5, by 1, shape (1,)"
    short = shortened(WRONG, settings)
    assert "unneeded" not in short and "seen[0] += 1" in short
    assert verdict(short, settings).startswith("differs: result 0 of ")


def test_a_printed_script_runs_by_itself(capsys):
    program = Program(0, Settings("speed", "stock"))
    exec(script(WRONG, program.settings, program.seed), {})
    assert capsys.readouterr().out.startswith("0 tensor(1.)")


def test_what_stock_refuses_is_not_asked_of_the_converted_network():
    source = WRONG.replace("seen = [torch.ones(1)]", "1 / 0")
    assert verdict(source, Settings("memory", "auto")).startswith(f"{REFUSED}: ZeroDivisionError")
