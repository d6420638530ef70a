"""What our models are besides the host's own classes of model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from .merging import dense_for_saving


def accepted(function: Callable, config: Mapping) -> dict:
    """What of a configuration a function takes by name: hosts come and go with theirs."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(config)
    return {key: value for key, value in config.items() if key in parameters}


class SavesDense:
    """Before a host's class of model: checkpoints saved from it hold real numbers."""

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> dict:
        saved = super().state_dict_for_saving(*args, **kwargs)
        return dense_for_saving(self, saved, "model.diffusion_model.", self.get_dtype())
