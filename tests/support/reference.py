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


def vit_mae_config(**changes):
    """Return the config of a small ViTMAE of transformers, of a published width."""
    import transformers

    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
    sizes |= {"image_size": 32, "patch_size": 8, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1}
    sizes |= {"decoder_num_attention_heads": 16, "decoder_intermediate_size": 256}
    return transformers.ViTMAEConfig(**{**sizes, **changes})
