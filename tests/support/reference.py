"""The names of the reference implementation."""

import torch


def reference_names(model) -> dict[str, torch.Tensor]:
    """The state dict under the names that the reference implementation gives it."""
    weights = {
        name.removeprefix("encoder."): t for name, t in model.state_dict().items() if name.startswith("encoder.")
    }
    for name, tensor in model.decoder.state_dict().items():
        weights["mask_token" if name == "mask_token" else f"decoder_{name}"] = tensor
    return weights
