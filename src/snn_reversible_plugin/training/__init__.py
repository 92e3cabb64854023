"""Training procedures in place of ``loss.backward()``, for any training loop.

The one idea: a procedure is one function that the user's own loop calls on a batch; optimizers, schedules
and logging stay the loop's. :func:`sltt_backward` drops the gradient through time, so that memory does not
grow with the number of steps. :func:`step_in_backward` lets the optimizer use each gradient as it stands,
so that gradients don't wait for one another.
"""

from snn_reversible_plugin.training.sltt import SLTTResult, sltt_backward
from snn_reversible_plugin.training.step_in_backward import StepInBackward, step_in_backward

__all__ = ["SLTTResult", "StepInBackward", "sltt_backward", "step_in_backward"]
