"""How much of an adapter counts: at 0 its base answers, at 1 the adapter as it was trained."""

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper


@torch.no_grad()
def set_strength(model: PeftModel, adapter: str, strength: float) -> None:
    """Move a freshly loaded adapter, by its name on the model, along the line from base (0) to adapter (1) and beyond.

    A weight becomes W + strength * scaling * B A. What an adapter puts in place of the base's own moves on the line
    between the two: the magnitude of DoRA, whose direction is that of the weight above, the modules that were trained
    in full, and the embeddings of trained tokens.
    """
    if strength == 1:
        return
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            module.scaling[adapter] *= strength
            if adapter in module.lora_magnitude_vector:
                magnitude = cast(Any, module.lora_magnitude_vector[adapter])
                # The norm as PEFT takes it, so that at 0 both are equal to the last bit and DoRA changes nothing.
                weight = dequantize_module_weight(module.get_base_layer())
                _move(magnitude.weight, magnitude.get_weight_norm(weight, 0, 0), strength)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            own = module.original_module.state_dict()
            for name, tensor in module.modules_to_save[adapter].state_dict().items():
                if tensor.is_floating_point():
                    _move(tensor, own[name], strength)
        elif isinstance(module, TrainableTokensLayer) and adapter in module.trainable_tokens_delta:
            if module.tied_adapter is not None:
                continue  # its rows are those of the layer it is tied to
            own_rows = cast(torch.Tensor, module.trainable_tokens_original[adapter])
            _move(module.trainable_tokens_delta[adapter], own_rows, strength)


def _move(trained: torch.Tensor, own: torch.Tensor, strength: float) -> None:
    trained.copy_(torch.lerp(own.to(trained), trained, strength))
