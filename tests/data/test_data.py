"""Event data: the simulated pixel, both data sets, frames and caches."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

tonic = pytest.importorskip("tonic")
pytest.importorskip("sklearn")

import fresh  # noqa: E402
from snn_reversible_plugin.data import (  # noqa: E402
    DigitSaccades,
    NMNISTFolder,
    brightness_events,
    event_frames,
)

NMNIST = Path(os.environ.get("SRP_NMNIST", Path(__file__).parents[2] / "../shared/data/nmnist")).resolve()


def test_a_bright_edge_moving_over_pixels_fires_on_then_off_behind_it():
    # A bright bar, two pixels wide, moves right over a dark row of ten.
    k, x = np.arange(60)[:, None], np.arange(10)[None, :]
    bar = ((x <= k / 6) & (x > k / 6 - 2)).astype(float)
    events = brightness_events(np.log(0.1 + bar)[:, None, :], 1000.0 * np.arange(60), 0.5)
    for pixel in range(1, 7):  # those that the bar reaches and leaves
        here = events[events["x"] == pixel]
        n = int((np.log(1.1) - np.log(0.1)) / 0.5)
        assert here["p"].tolist() == [True] * n + [False] * n
        # Lit at the first sample k with pixel <= k / 6, dark again two pixels later.
        assert np.all(here["t"][:n] <= 6000 * pixel) and np.all(here["t"][:n] > 6000 * pixel - 1000)
        assert np.all(np.abs(here["t"][n:] - 6000 * (pixel + 2)) <= 1000)


def test_events_sit_where_the_line_between_samples_crosses_the_levels():
    # 0 to 1 in 10 ms, then to -0.35 in 10 ms: up at 0.4 and 0.8, down at 0.4, 0.0 (exactly a
    # threshold below the last fired level each time); -0.4 is not reached.
    film = np.array([0.0, 1.0, -0.35])[:, None, None]
    events = brightness_events(film, np.array([0.0, 10_000.0, 20_000.0]), 0.4)
    assert events["p"].tolist() == [True, True, False, False]
    down = [10_000 + 10_000 * (1.0 - level) / 1.35 for level in (0.4, 0.0)]
    assert events["t"].tolist() == [4000, 8000, *np.rint(down).astype(int)]


def test_a_pixel_that_fired_earlier_fires_by_so_much_sooner():
    ramp = np.linspace(0.0, 1.0, 2)[:, None, None] * np.ones((1, 1, 3))
    start = np.array([[-0.1, 0.0, 0.1]])
    events = brightness_events(ramp, np.array([0.0, 10_000.0]), 0.4, start=start)
    assert events[["t", "x"]].tolist() == [
        (3000, 0), (4000, 1), (5000, 2), (7000, 0), (8000, 1), (9000, 2),
    ]  # fmt: skip


def test_a_pixel_is_silent_during_its_refractory_time_and_its_neighbour_is_not():
    film = np.linspace(0.0, 2.0, 3)[:, None, None] * np.array([[[1.0, 0.5]]])
    times = np.array([0.0, 10_000.0, 20_000.0])
    free = brightness_events(film, times, 0.25)
    slow = brightness_events(film, times, 0.25, refractory=5000.0)
    assert np.diff(free["t"][free["x"] == 0]).min() == 2500
    assert np.diff(slow["t"][slow["x"] == 0]).tolist() == [5000] * 3
    np.testing.assert_array_equal(free[free["x"] == 1], slow[slow["x"] == 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_intensity": np.zeros((3, 4))}, r"shape \(3, 4\)"),
        ({"times": np.arange(2.0)}, r"shape \(2,\) for 3 samples"),
        ({"times": np.array([0.0, 2.0, 2.0])}, "do not rise"),
        ({"threshold": 0.0}, "above 0"),
        ({"threshold": np.ones((4, 3))}, r"shape \(4, 3\)"),
        ({"refractory": -1.0}, "refractory is -1.0"),
        ({"log_intensity": np.full((3, 2, 4), -np.inf)}, "small constant"),
        ({"start": np.zeros(4)}, r"start has shape \(4,\)"),
        ({"start": np.full((2, 4), -0.2)}, "start is a threshold or more away"),
    ],
)
def test_a_film_that_makes_no_sense_is_refused(change, message):
    film = {"log_intensity": np.zeros((3, 2, 4)), "times": np.arange(3.0), "threshold": 0.2}
    with pytest.raises(ValueError, match=message):
        brightness_events(**(film | change))


def test_digits_are_recordings_of_tonics_type():
    data = DigitSaccades()
    assert isinstance(data, tonic.dataset.Dataset)
    assert len(data) == 1437
    assert len(DigitSaccades(train=False)) == 360
    for i in (0, 700, 1436):
        events, digit = data[i]
        assert events.dtype == tonic.io.events_struct
        assert 0 <= digit <= 9 and isinstance(digit, int)
        assert len(events) > 1000
        assert np.all(np.diff(events["t"]) >= 0)
        assert events["t"][0] >= 0 and events["t"][-1] <= 315_000
        for axis in "xy":
            assert events[axis].min() >= 0 and events[axis].max() < 34
        # A movement that ends where it began makes as much brighter as darker.
        assert 0.45 < events["p"].mean() < 0.55


def test_the_saccades_move_the_digit_as_in_nmnist():
    # The first moves it down, the second up, and both right; the third moves it left.
    events, _ = DigitSaccades()[0]
    for leg, (right, down) in enumerate([(1, 1), (1, -1), (-1, 0)]):
        now = events[(events["t"] // 105_000) == leg]
        on, off = now[now["p"]], now[~now["p"]]
        # Ink is bright: what grows brighter lies ahead of what grows darker.
        assert np.sign(on["x"].mean() - off["x"].mean()) == right
        if down:
            assert np.sign(on["y"].mean() - off["y"].mean()) == down


def test_recordings_depend_on_index_and_seed_and_nothing_else():
    first = DigitSaccades(seed=3)
    np.random.seed(1)  # noqa: NPY002  (it must not matter)
    again = DigitSaccades(seed=3, limit=20)
    again[4]  # the order of access leaves no trace
    np.testing.assert_array_equal(first[7][0], again[7][0])
    assert len(first[7][0]) != len(DigitSaccades(seed=4)[7][0])
    # The digit itself starts elsewhere, by up to 1.25 pixels either way.
    centres = [DigitSaccades(seed=seed)[7][0]["x"].mean() for seed in range(6)]
    assert 0.2 < np.std(centres) < 1.25
    last = DigitSaccades(train=False)
    np.testing.assert_array_equal(last[-1][0], last[len(last) - 1][0])


def test_twice_the_threshold_fires_less_than_half_as_much():
    low, high = DigitSaccades(threshold=0.2), DigitSaccades(threshold=0.4)
    for i in range(5):
        assert 0 < len(high[i][0]) < 0.55 * len(low[i][0])


def test_tonics_transforms_apply():
    crop = tonic.transforms.Compose(
        [
            tonic.transforms.Denoise(filter_time=20_000),
            tonic.transforms.CenterCrop((34, 34, 2), (20, 20)),
            tonic.transforms.ToFrame((20, 20, 2), n_time_bins=6),
        ]
    )
    data = DigitSaccades(
        limit=3,
        transform=crop,
        target_transform=lambda digit: digit + 100,
        transforms=lambda frames, digit: (frames * 2, digit + 1000),
    )
    frames, digit = data[1]
    assert frames.shape == (6, 2, 20, 20) and frames.sum() > 0 and not (frames % 2).any()
    assert digit == 1101


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4}, "size is 4"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"refractory": -1.0}, "refractory -1.0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_digit_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitSaccades(**arguments)


def test_an_index_beyond_the_data_is_refused():
    data = DigitSaccades(limit=5)
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index {index} of a data set of 5"):
            data[index]


def test_batches_have_time_first_and_count_every_event_but_the_last_bins_remainder():
    data = DigitSaccades(limit=10)
    batches = list(event_frames(data, steps=7, batch_size=4))
    assert [x.shape for x, _ in batches] == [(7, n, 2, 34, 34) for n in (4, 4, 2)]
    x, digit = batches[1]
    assert x.dtype == torch.float32 and digit.dtype == torch.int64
    assert digit.tolist() == data.targets[4:8]
    for n in range(4):
        events = data[4 + n][0]
        expected = tonic.transforms.ToFrame((34, 34, 2), n_time_bins=7)(events)
        assert torch.equal(x[:, n], torch.from_numpy(expected).float())
        assert 0.99 * len(events) < x[:, n].sum() <= len(events)


def test_a_silent_recording_gives_silent_frames():
    silent = DigitSaccades(limit=1, threshold=50.0)
    assert len(silent[0][0]) == 0
    (x, _), *_ = event_frames(silent, steps=3)
    assert x.shape == (3, 1, 2, 34, 34) and not x.any()


def test_the_order_is_drawn_from_the_seed_anew_each_epoch():
    data = DigitSaccades(limit=30)

    def epochs(seed):
        loader = event_frames(data, steps=1, batch_size=30, shuffle=True, seed=seed)
        return [next(iter(loader))[1].tolist() for _ in range(2)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert epochs(1)[0] != epochs(1)[1]
    assert sorted(epochs(1)[0]) == sorted(data.targets)


@pytest.mark.parametrize("on_disk", [False, True])
def test_frames_are_made_once(on_disk, tmp_path):
    made = []
    data = DigitSaccades(limit=6, transform=lambda events: (made.append(1), events)[1])
    loader = event_frames(data, steps=4, batch_size=3, cache=tmp_path if on_disk else None)
    first, second = list(loader), list(loader)
    assert len(made) == 6
    for (x, digit), (y, again) in zip(first, second, strict=True):
        assert torch.equal(x, y) and torch.equal(digit, again)
        assert x.dtype == y.dtype == torch.float32 and x.sum() > 0


def test_a_cache_folder_is_shared_by_equal_settings_alone(tmp_path):
    def total(steps=4, **arguments):
        (x, _), *_ = event_frames(DigitSaccades(limit=2, **arguments), steps=steps, cache=tmp_path)
        return x.shape, x.sum().item()

    reference = total()
    assert total() == reference and len(list(tmp_path.iterdir())) == 1
    others = [total(steps=5), total(threshold=0.6), total(size=20), total(train=False)]
    assert reference not in others and len(set(others)) == 4
    assert len(list(tmp_path.iterdir())) == 5


def test_frames_of_something_else_are_refused():
    with pytest.raises(TypeError, match="list has no sensor_size"):
        event_frames([1, 2])
    with pytest.raises(ValueError, match="steps is 0"):
        event_frames(DigitSaccades(limit=1), steps=0)


def write_recording(path: Path, events: list[tuple[int, int, int, int]]) -> None:
    """N-MNIST's format: x, y, then one bit of polarity and 23 of time, 5 bytes an event."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [bytes([x, y, (p << 7) | (t >> 16), (t >> 8) & 255, t & 255]) for x, y, t, p in events]
    path.write_bytes(b"".join(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("Train", 3), ("Test", 1)):
        for digit in (0, 1, 7):
            for i in range(count):
                write_recording(
                    tmp_path / part / str(digit) / f"{10 * digit + i:05}.bin",
                    [(digit, 33, 5, 1), (33, i, 70_000, 0), (2, 3, 300_000, 1)],
                )
    return tmp_path


def test_a_small_folder_is_read(folder):
    data = NMNISTFolder(folder)
    assert isinstance(data, tonic.dataset.Dataset)
    assert data.targets == [0, 0, 0, 1, 1, 1, 7, 7, 7]
    events, digit = data[5]
    assert digit == 1
    assert events.dtype == tonic.io.events_struct
    assert events.tolist() == [(1, 33, 5, True), (33, 2, 70_000, False), (2, 3, 300_000, True)]
    assert NMNISTFolder(folder, train=False).targets == [0, 1, 7]
    assert NMNISTFolder(folder, limit=4).targets == [0, 0, 1, 7]
    (x, _), *_ = event_frames(data, steps=2, batch_size=9)
    assert x.shape == (2, 9, 2, 34, 34)


def test_a_wrong_folder_is_named_with_the_layout_it_should_have(folder):
    layout = r"Train/<digit>/<id>\.bin"
    with pytest.raises(FileNotFoundError, match=f"absent.*{layout}"):
        NMNISTFolder(folder / "absent")
    with pytest.raises(ValueError, match=rf"has no 'Train' in it, only \['0', '1', '7'\].*{layout}"):
        NMNISTFolder(folder / "Train")
    shutil.rmtree(folder / "Test")
    (folder / "Test").mkdir()
    with pytest.raises(ValueError, match=f"Test' holds no recordings.*{layout}"):
        NMNISTFolder(folder, train=False)
    (folder / "Train" / "cats").mkdir()
    with pytest.raises(ValueError, match=f"cats' is not named by a digit.*{layout}"):
        NMNISTFolder(folder)


def test_a_damaged_recording_is_named(folder):
    path = folder / "Train" / "0" / "00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"00000\.bin' has 13 bytes"):
        NMNISTFolder(folder)[0]
    write_recording(path, [(34, 0, 1, 1)])
    with pytest.raises(ValueError, match=r"00000\.bin' has an event at x=34"):
        NMNISTFolder(folder)[0]


@pytest.mark.skipif(not NMNIST.is_dir(), reason=f"no N-MNIST at {NMNIST}: set SRP_NMNIST")
def test_nmnist_itself():
    data = NMNISTFolder(NMNIST)
    assert set(data.targets) == set(range(10)) and len(data) >= 700
    simulated = DigitSaccades(limit=20)
    counts = {}
    for name, source in (("real", data), ("simulated", simulated)):
        counts[name] = []
        for i in range(0, len(source), max(1, len(source) // 20)):
            events, _ = source[i]
            assert np.all(np.diff(events["t"]) >= 0) and 250_000 < events["t"][-1] < 350_000
            counts[name].append(len(events))
    # The simulation stands in for the real thing: as many events, give or take a factor of two.
    assert 0.5 < np.mean(counts["simulated"]) / np.mean(counts["real"]) < 2
    (x, digit), *_ = event_frames(NMNISTFolder(NMNIST, limit=10), steps=10)
    assert x.shape == (10, 10, 2, 34, 34)
    assert digit.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        ("tonic", "import snn_reversible_plugin.data"),
        ("sklearn", "import snn_reversible_plugin.data as data; data.DigitSaccades()"),
    ],
)
@pytest.mark.one_in(2)
def test_what_is_not_installed_is_named_with_the_extra(missing, use, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None\n{use}"
    done = fresh.python(code, tmp_path)
    assert done.returncode != 0
    assert "pip install 'snn-reversible-plugin[data]'" in done.stderr
