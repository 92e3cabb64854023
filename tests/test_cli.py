"""The command line and the demonstration behind it, at small size."""

import json
import sys
from importlib import metadata

import matplotlib.image
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fresh
import snn_reversible_plugin as srp
from snn_reversible_plugin import demo
from snn_reversible_plugin.__main__ import app
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.reports import fit

SMALL = {"epochs": 2, "steps": 8, "batch_size": 8, "width": 8, "size": 16, "limit": 24}
ARGUMENTS = [
    "--epochs",
    "2",
    "--steps",
    "8",
    "--batch",
    "8",
    "--width",
    "8",
    "--size",
    "16",
    "--limit",
    "24",
]


def run(*arguments):
    # A wide terminal, so that no message or table is broken into lines.
    return CliRunner().invoke(app, [str(part) for part in arguments], env={"COLUMNS": "250"})


@pytest.mark.slow
def test_the_demo_trains_twice_and_shows_it(tmp_path):
    picture = tmp_path / "new folder" / "demo.png"
    result = run("demo", *ARGUMENTS, "--plot", picture)
    assert result.exit_code == 0, result.output
    for piece in (
        "6 of 6 steps",
        "test accuracy",
        "held between forward and backward",
        "peak",
        str(picture),
        "What to try next",
    ):
        assert piece in result.output
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] > pixels.shape[0] > 1000  # memory over the step stands above the rest
    assert pixels.std() > 0.05


@pytest.mark.slow
def test_the_demo_compares_what_it_says():
    both = demo.compare(**SMALL)
    assert both.equal_steps == len(both.stock.losses) == 6
    assert both.largest_difference == 0
    assert len(set(both.stock.losses)) == 6, "nothing was learned"
    assert 0 <= both.stock.accuracy == both.converted.accuracy <= 1
    # 8 steps of three layers of neurons: stock keeps 13 bytes or more a neuron and step, the tape one bit.
    assert both.stock.held > 5 * both.converted.held > 0
    assert both.stock.peak > both.converted.peak > both.converted.held
    assert min(both.stock.seconds + both.converted.seconds) > 0


def test_the_demo_trains_as_an_ordinary_loop_does(monkeypatch):
    # Measuring leaves no trace, nor do the other network's steps.
    trainer = demo._Trainer(demo.network(4, 16), 1, "cpu")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.measure(torch.rand(3, 2, 2, 16, 16), torch.tensor([1, 2]))
    assert trainer.run.peak > trainer.run.held > 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())

    expected = demo.compare(**SMALL).converted.losses
    monkeypatch.setattr(demo._Trainer, "measure", lambda *_: None)
    monkeypatch.setattr(demo, "convert_to_reversible", lambda model, mode: model)
    assert demo.compare(**SMALL).stock.losses == expected


def test_the_demo_fails_when_a_loss_differs(monkeypatch, tmp_path):
    def convert_badly(model, mode):
        nn.init.zeros_(model[-1].bias)
        return srp.convert_to_reversible(model, mode=mode)

    monkeypatch.setattr(demo, "convert_to_reversible", convert_badly)
    result = run("demo", *ARGUMENTS, "--plot", tmp_path / "demo.png")
    assert result.exit_code == 1
    assert "0 of 6 steps" in result.output
    assert "apart" in result.output


def test_the_demo_refuses_to_take_no_step():
    with pytest.raises(ValueError, match="2 epochs of 24 recordings in full batches of 25 are no step"):
        demo.compare(**SMALL | {"batch_size": 25})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "4", "--batch", "8"), "give more epochs or recordings, or smaller batches"),
        (("--device", "nowhere"), "--device"),
    ],
)
def test_what_the_demo_refuses_is_no_traceback(arguments, message):
    result = run("demo", "--epochs", "1", "--steps", "2", "--size", "16", *arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module `own_models` that can be imported, with good and bad factories."""
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "from spikingjelly.activation_based import layer, neuron\n"
        "def build():\n"
        "    return nn.Sequential(layer.Conv2d(2, 8, 3, step_mode='m'), neuron.LIFNode(step_mode='m'),\n"
        "                         layer.Flatten(step_mode='m'), layer.Linear(8 * 36, 10, step_mode='m'))\n"
        "built = build()\n"
        "class TwoInputs(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = build()\n"
        "    def forward(self, a, b):\n"
        "        return self.inner(a) + b\n"
        "def sized(width): return build()\n"
        "def nothing(): return 3\n"
        "def no_neuron(): return nn.Linear(3, 3)\n"
        "def words(): return nn.Sequential(nn.Embedding(10, 8), neuron.LIFNode())\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_models", None)


@pytest.mark.parametrize("factory", ["build", "built"])
def test_a_report_of_a_users_model(models, factory):
    result = run("report", f"own_models:{factory}", "--shape", "8,4,2,8,8", "--plot", models / "report")
    assert result.exit_code == 0, result.output
    for piece in ("Conv2d", "LIFNode", "held", "peak", "report.png"):
        assert piece in result.output
    assert matplotlib.image.imread(models / "report.png").std() > 0.02


def test_a_users_model_is_verified(models, monkeypatch):
    result = run("verify", "own_models:build", "--shape", "8,4,2,8,8")
    assert result.exit_code == 0, result.output
    assert "bit-identical to stock" in result.output
    assert "off the grid" not in result.output  # which has nothing to do with neurons of many steps a call
    wrong = run("verify", "own_models:build", "--shape", "8,4,3,8,8")
    assert wrong.exit_code == 2 and "does not take an input of 8x4x3x8x8" in wrong.output

    import snn_reversible_plugin.reports.verification as verification

    monkeypatch.setattr(verification.Verification, "ok", False)
    assert run("verify", "own_models:build", "--shape", "8,4,2,8,8").exit_code == 1


def test_a_device_that_is_not_there_is_refused(models):
    result = run("report", "own_models:build", "--shape", "8,4,2,8,8", "--device", "nowhere")
    assert result.exit_code == 2 and "--device" in result.output and "Traceback" not in result.output


def test_a_report_takes_a_shape_for_each_input(models):
    result = run("report", "own_models:TwoInputs", "--shape", "8,4,2,8,8", "--shape", "8,4,10")
    assert result.exit_code == 0, result.output
    assert "inner.1" in result.output


def test_a_report_passes_the_mode_on(models, monkeypatch):
    seen = []
    import snn_reversible_plugin.reports.memory_report as report

    monkeypatch.setattr(report, "memory_report", lambda model, x: seen.append((model, x)) or Silent())
    assert run("report", "own_models:build", "--shape", "3,1,2,8,8", "--mode", "speed").exit_code == 0
    ((model, x),) = seen
    assert x.shape == (3, 1, 2, 8, 8) and 0 <= x.min() < x.max() <= 1
    assert settings_of(model).mode == "speed"


class Silent:
    def print(self):
        pass


@pytest.mark.parametrize(
    ("factory", "shape", "message"),
    [
        ("own_models", "8,4,2", "'own_models' names no factory"),
        (":build", "8,4,2", "':build' names no factory"),
        ("absent_module:build", "8,4,2", "No module named 'absent_module'"),
        ("own_models:absent", "8,4,2", "own_models has no 'absent'"),
        ("own_models:number", "8,4,2", "is of type int"),
        (
            "own_models:sized",
            "8,4,2",
            "does not work without arguments (missing a required argument: 'width')",
        ),
        ("own_models:nothing", "8,4,2", "made something of type int"),
        ("own_models:build", "8,four", "'8,four' is no shape"),
        ("own_models:build", "8,0,2", "'8,0,2' is no shape"),
        ("own_models:build", "", "'' is no shape"),
        ("absent.py:build", "8,4,2", "'absent.py:build' is not there"),
        (
            "own_models:build",
            "8,4,3,8,8",
            "does not take an input of 8x4x3x8x8: RuntimeError in 0: Given groups",
        ),
        (
            "own_models:build",
            "8,4,2,9,9",
            "does not take an input of 8x4x2x9x9: RuntimeError in 3: mat1 and mat2",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_remedy(models, factory, shape, message):
    result = run("report", factory, "--shape", shape)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_searched(models):
    result = run("fit", "own_models:build", "--shape", "T,N,2,9,9", "--steps", "4", "--budget", "1MiB")
    assert result.exit_code == 2
    assert "does not take an input of 4x2x2x9x9" in result.output


def test_a_budget_that_is_none_is_named(models):
    result = run("fit", "own_models:build", "--shape", "4,N,2,8,8", "--budget", "40apples")
    assert result.exit_code == 2 and "Invalid value for --budget: '40apples'" in result.output


def test_time_steps_without_a_number_are_asked_for(models):
    result = run("fit", "own_models:build", "--shape", "T,N,2,8,8", "--budget", "1MiB")
    assert result.exit_code == 2 and "say how many, as in --steps 8" in result.output


def test_a_file_is_a_module_too_and_its_neighbours_are_found(models):
    (models / "train.py").write_text(
        "from own_models import build\nassert __name__ == 'train'\nbuild_it = build\n"
    )
    try:
        result = run("report", f"{models / 'train.py'}:build_it", "--shape", "4,2,2,8,8")
    finally:
        sys.modules.pop("train", None)
    assert result.exit_code == 0, result.output
    assert "LIFNode" in result.output


def test_a_fit_is_a_table_and_a_picture(models):
    arguments = ["--shape", "T,N,2,8,8", "--steps", "2", "--budget", "300KiB"]
    result = run("fit", "own_models:build", *arguments, "--plot", models / "fit.png")
    assert result.exit_code == 0, result.output
    assert all(mode in result.output for mode in ("stock", "memory", "speed", "auto"))
    assert "Largest batches in 300KiB" in result.output  # as it was written
    assert matplotlib.image.imread(models / "fit.png").std() > 0.02


def test_what_is_free_is_said_to_be():
    one = fit.Fit(3, 900_000, 900_000, 0.1, 5_000_000)
    assert fit.Fits(rows=[("stock", None, one)]).title == "Largest batches in 4.77 MiB, which are free"


def test_a_peak_is_in_the_unit_of_its_size():
    """A peak of 41.7 MB would seem to be above a budget of 40 MiB."""
    peaks = (900, 900_000, 41_700_000)
    found = fit.Fits("40MiB", [("stock", None, fit.Fit(3, peak, peak, 0.1, 40 << 20)) for peak in peaks])
    assert list(found.table().columns[3].cells) == ["900 B", "878.91 KiB", "39.77 MiB"]


@pytest.mark.parametrize("plot", ["report.nothing", "own_models.py/report.png"])
def test_a_picture_that_cannot_be_written_names_its_path(models, plot):
    path = models / plot
    result = run("report", "own_models:build", "--shape", "4,2,2,8,8", "--plot", path)
    assert result.exit_code == 2 and "--plot" in result.output and str(path) in result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import spikingjelly.no_part", "install the release of spikingjelly that it was written for"),
        (
            "raise ModuleNotFoundError('none', name='snntorch')",
            "pip install 'snn-reversible-plugin[snntorch]'",
        ),
        ("import no_such_library", "install what it needs"),
        ("from .neighbour import Net", "name it as package.module:factory"),
    ],
)
def test_a_script_that_cannot_be_imported_says_what_to_do(models, line, message):
    (models / "script.py").write_text(line + "\n")
    result = run("report", f"{models / 'script.py'}:Net", "--shape", "4,2,2,8,8")
    sys.modules.pop("script", None)
    assert result.exit_code == 2 and message in result.output, result.output


def test_without_a_command_it_explains_itself():
    result = run()
    assert result.exit_code == 0
    for piece in ("convert_to_reversible(model)", "demo", "report", "verify", "fit", "--help"):
        assert piece in result.output
    assert max(map(len, result.output.splitlines())) < 80


def test_without_matplotlib_there_is_a_table_and_a_word(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("report", "own_models:build", "--shape", "4,2,2,8,8", "--plot", models / "none.png")
    assert result.exit_code == 0, result.output
    assert "snn-reversible-plugin[plot]" in result.output and not (models / "none.png").exists()


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        (
            "def Net():\n    return inner()\ndef inner():\n    raise TypeError('a mistake of its own')",
            ("line 2, in Net", "line 4, in inner", "TypeError: a mistake of its own"),
        ),
        (
            "import torch\ndef Net():\n    return torch.nn.Linear(3, -3)",
            ("line 3, in Net", "RuntimeError: Trying to create tensor with negative dimension"),
        ),
        ("def Net(:\n    pass", ('script.py", line 1', "SyntaxError: invalid syntax")),
        (
            "from own_models import nobody",
            ("line 1, in <module>", "ImportError: cannot import name 'nobody'"),
        ),
        ("Net = open('no such file')", ("line 1, in <module>", "FileNotFoundError")),
    ],
    ids=["factory", "in torch", "syntax", "import", "no file"],
)
def test_a_mistake_of_the_users_is_shown_without_frames_of_ours(models, line, pieces):
    (models / "script.py").write_text(line + "\n")
    result = run("report", f"{models / 'script.py'}:Net", "--shape", "3")
    sys.modules.pop("script", None)
    assert result.exit_code == 1
    assert all(piece in result.output for piece in pieces), result.output
    assert "snn_reversible_plugin" not in result.output and "site-packages" not in result.output
    assert len(result.output.splitlines()) < 12


def test_what_a_model_wants_beside_floats_is_said(models):
    result = run("verify", "own_models:words", "--shape", "8,4")
    assert result.exit_code == 2 and "--shape" not in result.output
    said = " ".join(result.output.replace("│", " ").split())
    assert "scalar types: Long, Int" in said
    assert said.index("Long, Int") < said.index("Inputs are random floats of that shape")


@pytest.mark.parametrize("command", ["report", "verify"])
def test_letters_in_a_shape_are_for_fit(models, command):
    result = run(command, "own_models:build", "--shape", "T,N,2,8,8")
    assert result.exit_code == 2 and "'T,N,2,8,8': letters are for fit" in result.output


def test_steps_without_a_place_in_the_shape_are_refused(models):
    result = run("fit", "own_models:build", "--shape", "8,N,2,8,8", "--steps", "4", "--budget", "1MiB")
    assert result.exit_code == 2 and "it needs a T in the shape" in result.output


def test_the_version_is_the_installed_one():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, metadata.version("snn-reversible-plugin") + "\n")
    assert srp.__version__ == metadata.version("snn-reversible-plugin")
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        srp.version  # noqa: B018


def test_a_version_that_nobody_knows_is_no_attribute(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert not hasattr(srp, "__version__")


def test_nothing_that_the_demo_counts_was_made_before(tmp_path):
    """Torch would write a line to stderr, the first time in a process: so in one of its own."""
    code = (
        "import torch; from snn_reversible_plugin import demo;"
        "trainer = demo._Trainer(demo.network(4, 16), 1, 'cpu');"
        "trainer.measure(torch.rand(3, 2, 2, 16, 16), torch.tensor([1, 2]))"
    )
    done = fresh.python(code, tmp_path)
    assert (done.returncode, "allocated before" in done.stderr) == (0, False), done.stderr


def test_the_demos_picture_names_what_it_draws():
    losses = [2.31, 2.27, 2.33]
    runs = [demo.Run(losses, [1.0] * 3, 0.5, held, 3 << 20) for held in (2 << 20, 5 << 10)]
    curve, bars = demo.Comparison(*runs).plot().axes
    assert curve.get_ylim()[1] > 1.05 * max(losses)  # half a line's width
    texts = [text.get_text() for text in bars.texts]
    assert texts == ["2.00 MiB", "3.00 MiB", "5.00 KiB", "3.00 MiB"]


def test_the_package_runs_as_a_module(tmp_path):
    code = "import runpy; runpy.run_module('snn_reversible_plugin', run_name='__main__', alter_sys=True)"
    done = fresh.python(code, tmp_path, "--help")
    assert done.returncode == 0
    assert "demo" in done.stdout and "report" in done.stdout


def test_the_import_needs_torch_alone(tmp_path):
    # Whatever else is imported by then, importing torch has brought along.
    code = (
        "import sys, torch, json; before = set(sys.modules); import snn_reversible_plugin;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(json.dumps(sorted(new - set(sys.stdlib_module_names))))"
    )
    done = fresh.python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) <= {"snn_reversible_plugin", "torch"}


def test_what_the_demo_needs_is_named_with_the_extra(tmp_path):
    code = "import sys; sys.modules['spikingjelly'] = None; import snn_reversible_plugin.demo"
    done = fresh.python(code, tmp_path)
    assert done.returncode != 0
    assert "pip install 'snn-reversible-plugin[all]'" in done.stderr


def test_the_network_of_the_demo_is_stock():
    names = {type(module).__module__.partition(".")[0] for module in demo.network(4, 16).modules()}
    assert names == {"torch", "spikingjelly"}
    assert demo.network(4, 16)(torch.rand(3, 2, 2, 16, 16)).shape == (3, 2, 10)
    assert {"conv1", "lif3", "linear"} <= {name for name, _ in demo.network(4, 16).named_modules()}
