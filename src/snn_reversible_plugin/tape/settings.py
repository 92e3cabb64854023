"""How a model is recorded, as the conversion decided; a model's copies have it too.

The one idea: a mode is a name for users; what a tape takes is whether products are replayed, and the plans
of the model. Source: this package's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snn_reversible_plugin import tape
from snn_reversible_plugin.tape import recording
from snn_reversible_plugin.tape.findings import Observer
from snn_reversible_plugin.tape.plans import Plans

MODES = (*tape.MODES, "auto")  # which products are kept is then a plan's, and the tape runs as "memory"


@dataclass
class Settings:
    """What ``convert_to_reversible`` decided; lives on the root module and travels with its copies.

    ``stays_stock`` maps the names of neurons that stayed stock to the reason, ``off_grid`` those that are
    reversible but run stock arithmetic where ``arithmetic`` would have them on the grid. ``plans``, in mode
    "auto", says which products are kept.
    """

    mode: str = "memory"
    arithmetic: str = "auto"
    stays_stock: dict[str, str] = field(default_factory=dict)
    off_grid: dict[str, str] = field(default_factory=dict)
    plans: Plans | None = None

    def recording(self, *, check: bool = False, observer: Observer | None = None) -> recording:
        """A tape for a call of the model."""
        mode = "memory" if self.plans is not None else self.mode
        return recording(mode, check=check, observer=observer, plans=self.plans)


def settings_for(mode: str, budget: int | None = None, arithmetic: str = "auto") -> Settings:
    """Settings for a mode, or for a budget in bytes, which chooses as mode "auto" does.

    Raises:
        ValueError: there is no such mode, or it leaves a budget nothing to choose.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    if budget is None:
        return Settings(mode, arithmetic, plans=Plans() if mode == "auto" else None)
    if mode in ("speed", "minimal"):
        keeps = {"speed": "everything", "minimal": "nothing"}[mode]
        raise ValueError(
            f'budget= chooses what is kept, mode="{mode}" keeps {keeps}: leave one of them out'
        )
    return Settings("auto", arithmetic, plans=Plans(budget))
