"""Event data for training: recordings as tonic data sets, frames as ``[T, N, C, H, W]`` batches.

The idea: tonic already has the event type, the transforms and the caches, so what is here is only
what it lacks: a data set that needs no download (`DigitSaccades`), a reader for N-MNIST folders of
any size (`NMNISTFolder`), and the few lines that turn either into batches (`event_frames`).

Source: tonic, https://tonic.readthedocs.io. Needs the extra ``data``.
"""

try:
    import tonic  # noqa: F401  (asked for here, so that the error names the extra)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"snn_reversible_plugin.data needs tonic, which could not be imported ({error}): "
        "pip install 'snn-reversible-plugin[data]'",
        name=error.name,
    ) from error

from snn_reversible_plugin.data.dvs import brightness_events
from snn_reversible_plugin.data.frames import event_frames
from snn_reversible_plugin.data.nmnist import NMNISTFolder
from snn_reversible_plugin.data.saccades import DigitSaccades

__all__ = ["DigitSaccades", "NMNISTFolder", "brightness_events", "event_frames"]
