"""What our models are besides the host's own classes of model."""

from __future__ import annotations

from .merging import dense_for_saving


class SavesDense:
    """Before a host's class of model: checkpoints saved from it hold real numbers."""

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> dict:
        saved = super().state_dict_for_saving(*args, **kwargs)
        return dense_for_saving(self, saved, "model.diffusion_model.", self.get_dtype())
