"""Export a ViT of transformers, random weights, by optimum: run by an interpreter that has it.

python bench/peers/optimum_export.py WIDTH DEPTH HEADS OUT_FOLDER
"""

import sys
from pathlib import Path

from optimum.exporters.onnx import main_export
from transformers import ViTConfig, ViTImageProcessor, ViTModel

width, depth, heads = map(int, sys.argv[1:4])
folder = Path(sys.argv[4])
config = ViTConfig(
    hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width, image_size=224
)
ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "model")
ViTImageProcessor().save_pretrained(folder / "model")
main_export(str(folder / "model"), str(folder), task="feature-extraction", do_validation=False)
