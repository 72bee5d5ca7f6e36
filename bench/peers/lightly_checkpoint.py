"""Write a checkpoint that `lightly-train embed` reads, with the weights of one of maekit's encoders.

Runs in the environment of lightly-train. Built as its training builds one, only not trained.
"""

import argparse
import json
from pathlib import Path

import timm
from lightly_train._checkpoint import Checkpoint, CheckpointLightlyTrain, CheckpointLightlyTrainModels
from lightly_train._models import package_helpers
from lightly_train._models.embedding_model import EmbeddingModel
from lightly_train._transforms.transform import NormalizeArgs
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="timm's name")
    parser.add_argument("--weights", type=Path, required=True, help="encoder.safetensors of a run")
    parser.add_argument("--preprocess", type=json.loads, required=True, help="as the ONNX file's metadata has it")
    options = parser.parse_args()
    model = timm.create_model(options.model, num_classes=0).eval()
    model.load_state_dict(load_file(options.weights))
    wrapped = package_helpers.get_wrapped_model(model, num_input_channels=3)
    spec = options.preprocess
    info = CheckpointLightlyTrain.from_now(
        models=CheckpointLightlyTrainModels(
            model=wrapped.get_model(), wrapped_model=wrapped, embedding_model=EmbeddingModel(wrapped)
        ),
        normalize_args=NormalizeArgs(mean=tuple(spec["mean"]), std=tuple(spec["std"])),
    )
    Checkpoint(state_dict=model.state_dict(), lightly_train=info).save(options.out)


if __name__ == "__main__":
    main()
