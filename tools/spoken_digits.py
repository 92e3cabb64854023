"""Synthetic speech for the benchmarks: digits in English and German, through a filter bank.

    apt-get install espeak-ng; python tools/spoken_digits.py

Writes benchmarks/spoken_digits.npz: ``energy`` uint8 ``[160, 100, 64]``, log energies of 64 bands on the
mel scale in frames of 10 ms, and ``label`` ``[160]``, the digit, and the digit plus ten in German, as in
the Heidelberg digits (Cramer et al., TNNLS 2020), which these are not: nobody spoke them.
"""

import subprocess
import wave
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np

PATH = Path(__file__).parents[1] / "benchmarks" / "spoken_digits.npz"
VOICES, PITCHES, SPEEDS = ("+m1", "+f2"), (35, 65), (130, 170)
FRAMES, BANDS, WINDOW = 100, 64, 512
WORDS = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
}


def spoken(word: str, voice: str, pitch: int, speed: int) -> tuple[np.ndarray, int]:
    """Samples from -1 to 1, and how many a second."""
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    with wave.open(BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)) as file:
        # The header of a stream does not know its length.
        raw = file.readframes(10**7)
        return np.frombuffer(raw, dtype="<i2") / 2**15, file.getframerate()


def filter_bank(rate: int) -> np.ndarray:
    """Triangles on the mel scale from 60 Hz to 8 kHz, ``[BANDS, WINDOW // 2 + 1]``."""
    mel = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (60, 8000)), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.fft.rfftfreq(WINDOW, 1 / rate)
    rise = (hertz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - hertz) / np.diff(edges)[1:, None]
    return np.clip(np.minimum(rise, fall), 0, None)


def energy(samples: np.ndarray, rate: int) -> np.ndarray:
    """Log energies ``[FRAMES, BANDS]`` from 0 to 255; what lacks at the end is silence."""
    hop = rate // 100
    samples = np.pad(samples[: FRAMES * hop], (0, max(0, FRAMES * hop - len(samples)) + WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::hop][:FRAMES]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2
    level = np.log10(power @ filter_bank(rate).T + 1e-4)
    return np.clip(255 * (level + 4) / 6, 0, 255).astype(np.uint8)


def main() -> None:
    """Speak, filter, store."""
    found, labels = [], []
    for voice, pitch, speed in product(VOICES, PITCHES, SPEEDS):
        for place, (language, words) in enumerate(WORDS.items()):
            for digit, word in enumerate(words):
                found.append(energy(*spoken(word, language + voice, pitch, speed)))
                labels.append(10 * place + digit)
    np.savez_compressed(PATH, energy=np.stack(found), label=np.array(labels, dtype=np.int64))
    print(f"{PATH}: {len(found)} recordings, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
