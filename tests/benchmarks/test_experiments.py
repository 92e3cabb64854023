"""The command line, at a tiny size: every experiment measures, stores, goes on, and is shown."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import pages, running, store, targets
from benchmarks.experiment import Experiment, Options, Work
from benchmarks.experiments import EXPERIMENTS, host_time, peaks
from benchmarks.networks import LeakyLoop
from benchmarks.tables import markdown, note
from tests.examples.test_examples import nmnist_folder  # noqa: F401

ARMS = ("RevSResNet24", "RevSResNet24, run plainly", "MS-ResNet20", "MS-ResNet20, trained on")
SMALL = {
    "steps": ["--only", "chain-8", "--only", "leaky-loop", "--method", "memory"],
    "over-step": ["--only", "vgg"],
    "fits": ["--only", "tutorial-6", "--method", "stock", "--method", "grid"],
    "host-time": ["--only", "*loop", "--only", "VGG"],
    "drift": ["--only", "8", "--method", "float", "--method", "grid"],
    "compiled": ["--method", "stock", "--method", "tape, memory"],
    "columns": ["--method", "published", "--method", "grid"],
    "parallel": [],
    "published": ["--only", "TET"],
    "peaks": ["--only", "vgg", "--only", "TET"],
    "budgets": ["--only", "vgg", "--only", "TET"],
    "freed-memory": ["--only", "spikformer"],
    "surgery": ["--only", "SEW*", "--method", "wrapped, converted"],
    "reversal-rebuilt": ["--only", "*beta 0.9,*"],
    "reversal-bytes": ["--only", "snnTorch, hard reset, beta 0.9"],
    "reversal-time": ["--only", "SpikingJelly, soft*"],
    "coupled-times": [],
    "coupled-held": [],
    "sltt": [],
    "long-sequences": ["--method", "reversible"],
    "time-accuracy": ["--method", "stock", "--method", "SLTT-5"],
    "column-accuracy": ["--only", "events*", "--method", "columns, undone", "--method", "*plainly"],
    "wrap-accuracy": ["--only", "events, SEW*"],
    "compiled-accuracy": ["--method", "stock"],
    "compiled-deep": ["--method", "stock", "--method", "tape, memory"],
    "block-accuracy": [argument for arm in ARMS for argument in ("--method", arm)],
}
SLOW = (
    "over-step",
    "fits",
    "peaks",
    "budgets",
    "freed-memory",
    "host-time",
    "reversal-bytes",
    "reversal-rebuilt",
    "reversal-time",
    "compiled-deep",
    "published",
    "coupled-held",
    "parallel",
    "surgery",
    "wrap-accuracy",
    "long-sequences",
    "columns",
)


@pytest.fixture(scope="module")
def invoke(nmnist_folder, tmp_path_factory):  # noqa: F811
    """Runs an experiment, and gives what is stored afterwards."""
    out = tmp_path_factory.mktemp("results")

    def call(name, *arguments):
        size = ["--profile", "quick", "--repeats", "1", "--folder", str(nmnist_folder), "--out", str(out)]
        outcome = CliRunner().invoke(command.app, ["run", name, *SMALL[name], *size, *arguments])
        assert outcome.exit_code == 0, outcome.output
        return store.load(out / f"{EXPERIMENTS[name].stem('cpu')}.json")

    return call


def test_every_experiment_is_tested():
    assert EXPERIMENTS.keys() == SMALL.keys()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL],
)
def test_an_experiment_measures_stores_and_is_shown(name, invoke):
    found = invoke(name)
    assert found
    for entry in found.values():
        assert entry["context"]["code"] and entry["date"]
        assert "why_not" not in entry and "error" not in entry
    tables = [markdown(render(found)) for render in EXPERIMENTS[name].tables.values()]
    assert tables[0].count("\n") >= 2
    assert invoke(name) == found  # the dates say that nothing ran


def test_what_the_figures_have_to_be(invoke):
    steps = invoke("steps")
    assert {entry["method"] for entry in steps.values()} == {"stock", "memory"}
    for work in ("chain-8", "leaky-loop"):
        assert steps[f"{work} | memory"]["gradient_difference"] == 0
        assert steps[f"{work} | memory"]["held"] < steps[f"{work} | stock"]["held"]
    drift = invoke("drift")
    assert drift["8 | float"]["max_error"] > 0 == drift["8 | grid"]["max_error"]
    assert drift["8 | grid"]["flipped_spikes"] == 0 < drift["8 | grid"]["spikes"]
    gradients = {entry["node"]: entry["gradient"] for entry in invoke("coupled-times").values()}
    assert set(gradients.values()) == {"equal", ""} and gradients["autograd"] == "equal"
    assert invoke("sltt")["6 | through time, stock"]["cosine"] == pytest.approx(1)


@pytest.mark.slow
def test_what_columns_hold_and_rebuild(invoke):
    columns = invoke("columns")
    assert columns["narrow, 4 | grid"]["max_error"] == 0 < columns["narrow, 4 | published"]["max_error"]
    assert (
        3 * columns["narrow, 4 | grid"]["peak_beyond_gradients"] < columns["narrow, 4 | published"]["peak"]
    )


def test_own_calls_are_counted(invoke):
    found = invoke("host-time")
    assert {entry["calls"] for key, entry in found.items() if "| stock" in key} == {0}
    assert found["VGG | stock, watched"]["seconds"]
    for network in ("SpikingJelly loop", "snnTorch loop", "VGG"):
        assert all(found[f"{network} | {mode}"]["calls"] > 100 for mode in ("memory", "speed"))


@pytest.mark.slow
def test_steps_are_rebuilt(invoke):
    assert all(entry["differ"] == 0 for entry in invoke("reversal-rebuilt").values())


@pytest.mark.slow
def test_what_fits_is_foreseen(invoke):
    steps = invoke("steps", "--fits")
    assert steps["leaky-loop | memory"]["largest"] >= steps["leaky-loop | stock"]["largest"] > 0
    fits = invoke("fits")
    batches = [fits[f"tutorial-6 | {method}"]["fits"]["8"] for method in ("stock", "grid")]
    assert 0 < 5 * batches[0] < batches[1]
    assert all(abs(entry["off"]) < 0.1 for entry in fits.values())


def test_what_networks_learn(invoke):
    found = invoke("block-accuracy")
    for data in ("events", "nmnist"):
        ours, plain, short, long = (found[f"{data}, seed 0 | {arm}"]["losses"] for arm in ARMS)
        assert ours == plain != []
        assert len(long) == 2 * len(short) and long[: len(short)] == short
    assert found["events, seed 0 | RevSResNet24"]["parameters"] == 260_362
    table = markdown(EXPERIMENTS["block-accuracy"].tables["block-accuracy"](found))
    assert "equal to those of RevSResNet24, run plainly, bit for bit, in 2 of 2 runs" in table
    assert all(0 <= entry["test_accuracy"] <= 1 for entry in invoke("time-accuracy").values())


def test_what_columns_and_wrapped_networks_learn(invoke):
    columns = invoke("column-accuracy")
    ours, plain = (
        columns[f"events, seed 0 | columns, {how}"]["losses"] for how in ("undone", "run plainly")
    )
    assert ours == plain != []
    couplings = invoke("wrap-accuracy")
    assert len({entry["trained"] for entry in couplings.values()}) == 1
    losses = [entry["losses"] for entry in couplings.values()]
    assert len(losses) == 3 and losses[0] != losses[1] != losses[2] != losses[0]
    assert len(next(iter(couplings.values()))["after"]) == 3


@pytest.mark.slow
def test_pictures_are_drawn(invoke, tmp_path):
    for name in ("steps", "block-accuracy", "time-accuracy"):
        drawn = EXPERIMENTS[name].draw(invoke(name), tmp_path, "cpu")
        assert drawn and all(path.stat().st_size > 1000 for path in drawn)


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["steps", "--only", "nothing"], ["steps", "--method", "nothing"], ["--device", "cuda"]],
)
def test_what_is_not_there_is_refused(arguments, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert CliRunner().invoke(command.app, ["run", *arguments, "--profile", "quick"]).exit_code == 2


def counted(together=False):
    """An experiment that writes down what is measured."""
    runs = []

    def measure(method, _options, _tick, size):
        runs.append((method, size))
        return {"figure": size}

    def all_of(methods, options, tick, size):
        return {method: measure(method, options, tick, size) for method in methods}

    works = lambda _: [Work(f"work {size}", ("a", "b"), {"size": size}) for size in (1, 2)]  # noqa: E731
    how = {"together": all_of} if together else {"measure": measure}
    return Experiment("counted", works, lambda _: [note("")], **how), runs


@pytest.mark.parametrize("together", [False, True])
def test_a_run_goes_on_where_it_was_interrupted(together, tmp_path):
    experiment, runs = counted(together)
    options, path = Options(), tmp_path / "counted.json"
    every = [(method, size) for size in (1, 2) for method in ("a", "b")]

    def run(only=None, methods=None, fresh=False):
        before = len(runs)
        works = running.chosen(experiment, options, only, methods)
        list(running.run(experiment, works, options, path, fresh, lambda _: None))
        return runs[before:]

    interrupted = running.chosen(experiment, options, None, None)
    next(iter(running.run(experiment, interrupted, options, path, False, lambda _: None)))
    assert list(store.load(path)) == ["work 1 | a", "work 1 | b"]
    assert run() == [("a", 2), ("b", 2)]
    assert run() == [] and run(fresh=True) == every
    entries = store.load(path)
    del entries["work 2 | b"]
    path.unlink()
    store.save(path, entries)
    assert run(only=["work 1"]) == []
    # The first method is what the others of one run are compared with.
    assert run(methods=["b"]) == ([("a", 2), ("b", 2)] if together else [("b", 2)])
    assert list(store.load(path)) == [f"work {size} | {method}" for method, size in every]


def test_times_are_measured_in_one_run_when_all_else_is_stored(tmp_path):
    runs, path = [], tmp_path / "counted.json"

    def measure(method, _options, _tick, size):
        runs.append(method)
        return {"why_not": "it does not run"} if method == "c" else {"figure": size}

    def timed(methods, _options, _tick, size, repeats):
        runs.append((methods, repeats))
        return {method: {"seconds": [size] * repeats} for method in methods}

    def works(options):
        settings = {"size": 1, "repeats": options.rounds(3, least=0)}
        return [Work("work", ("a", "b", "c"), settings)]

    experiment = Experiment("counted", works, lambda _: [note("")], measure, timed=timed, goes_stale=False)

    def run(methods=None, fresh=False, **options):
        runs.clear()
        chosen = running.chosen(experiment, options := Options(**options), None, methods)
        list(running.run(experiment, chosen, options, path, fresh, lambda _: None))
        return [*runs]

    assert run(repeats=0) == ["a", "b", "c"] and "seconds" not in store.load(path)["work | a"]
    assert run(repeats=0) == []
    assert run() == [(("a", "b"), 3)] and run() == [] and run(repeats=2) == []
    assert store.load(path)["work | b"]["figure"] == 1
    assert run(repeats=5) == [(("a", "b"), 5)]
    # What was measured again has no time yet, and what it is compared with is measured with it.
    assert run(methods=["b"], repeats=0, fresh=True) == ["a", "b"]
    assert "seconds" not in store.load(path)["work | b"]
    assert run(methods=["b"]) == [(("a", "b"), 3)]


def test_stored_keys_are_those_of_the_experiments():
    options = Options(folder=Path(__file__).parent, seeds=10)  # of what is near to noise, more are stored
    for name, experiment in EXPERIMENTS.items():
        known = {f"{work.name} | {method}" for work in experiment.works(options) for method in work.methods}
        assert store.load(store.RESULTS / f"{experiment.stem('cpu')}.json").keys() <= known, name


def test_targets_that_are_missed_or_not_measured_say_so():
    target = targets.Target("≤", "work", "ratio", 2, "a/* | x/figure over a/k | y/figure")
    entries = {"k | x": {"figure": 3}, "l | x": {"figure": 5}, "k | y": {"figure": 2}}
    assert target.measured({"a": entries}) == 2.5 and not target.is_reached(2.5)
    assert target._replace(sign="≥").is_reached(2.5)
    assert target.measured({}) is None and not target.is_reached(None)
    rows = {row[0]: row for row in targets.table({}).rows}
    assert all(row[2] == "not measured" for row in rows.values())
    assert CliRunner().invoke(command.app, ["targets"]).exit_code in (0, 1)
    assert all(target.measured(pages.load_all()) is not None for target in targets.TARGETS)


def test_pages_and_pictures_are_made_again(monkeypatch, tmp_path):
    shutil.copy(store.RESULTS / "time-accuracy.json", tmp_path)
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "IMAGES", tmp_path)
    before = [page.read_text() for page in pages.pages()]
    outcome = CliRunner().invoke(command.app, ["pages"])
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "time-losses.png").stat().st_size > 1000
    assert [page.read_text() for page in pages.pages()] == before  # they were up to date


def test_results_are_json_a_line_an_entry():
    for path in store.RESULTS.glob("*.json"):
        entries = json.loads(path.read_text())["results"]
        contexts = json.loads(path.read_text())["contexts"]
        assert path.read_text().count("\n") == len(entries) + max(len(contexts), 1) + 3


@pytest.mark.slow
def test_peaks_are_of_every_mode_and_say_how_far_a_budget_was_off(invoke):
    found = invoke("peaks")
    for name in ("vgg", "TET"):
        peaks = {mode: found[f"{name} | {mode}"]["peak"] for mode in ("stock", "memory", "auto")}
        assert peaks["auto"] <= peaks["memory"] < peaks["stock"]
        assert 0 < found[f"{name} | stock's forward"]["peak"] < peaks["stock"]
    memory = found["vgg | memory"]
    assert 0 < memory["foreseen"] <= memory["whole"]


@pytest.mark.slow
def test_a_peak_is_not_that_of_networks_before_it():
    """snnTorch resets all neurons that there ever were; auto keeps nothing in a loop of calls."""
    (work,) = (one for one in peaks.works(Options(quick=True)) if one.name == "tutorial-6")
    found = [peaks.measure(mode, Options(quick=True), str, **work.settings) for mode in ("memory", "auto")]
    assert found[0]["held"] == found[1]["held"]
    assert found[1]["peak"] <= found[0]["peak"]


def test_the_products_that_run_again_are_those_in_front_of_neurons():
    net, x = LeakyLoop(8), torch.rand(5, 2, 8)
    products = host_time.products_of(net, lambda: net(x).sum())
    assert [layer for layer, _ in products] == [net.fc1, net.fc2] * 5
    assert all(map(torch.equal, [given for layer, given in products if layer is net.fc1], x))
    calls = []
    for layer in net.children():
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    host_time.with_products_again(lambda: net(x).sum(), products)
    assert calls[-10:] == [net.fc1, net.fc2] * 5 and len(calls) == 5 * 5 + 10
