"""maekit: tar shards -> masked autoencoder -> ONNX encoder -> embeddings.

Every command is a function of its name that takes the config of its name: `maekit.embed(maekit.EmbedConfig(...))`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maekit.version import __version__

if TYPE_CHECKING:
    from maekit.checking import check, check_shards
    from maekit.config import PretrainConfig
    from maekit.config.check import CheckConfig, DoctorConfig, InspectConfig
    from maekit.config.embed import EmbedConfig
    from maekit.config.evaluate import EvaluateConfig
    from maekit.config.export import ExportConfig
    from maekit.config.finetune import FinetuneConfig
    from maekit.config.pack import PackConfig
    from maekit.config.pages import NeighboursConfig, ReconstructConfig, ReportConfig
    from maekit.config.sweep import SweepConfig
    from maekit.diagnosis import doctor
    from maekit.embedding.embed import embed
    from maekit.embedding.embedder import Embedder
    from maekit.evaluation.evaluate import evaluate
    from maekit.exporters.export import export
    from maekit.exporters.verify import verify
    from maekit.finetuning.finetune import finetune
    from maekit.inspection import inspect
    from maekit.pages.neighbours import neighbours
    from maekit.pages.reconstruct import reconstruct
    from maekit.pages.report import report
    from maekit.pretraining.pretrain import pretrain
    from maekit.shards.pack import pack
    from maekit.shards.spec import find_shards
    from maekit.sweeping import sweep
    from maekit.system.errors import ImageError, InputError, MaekitError, Stopped

# Nothing heavy loads before it is used: `import maekit` must stay cheap for embedding workers and for `--help`.
_HOMES = {
    "CheckConfig": "maekit.config.check",
    "DoctorConfig": "maekit.config.check",
    "EmbedConfig": "maekit.config.embed",
    "Embedder": "maekit.embedding.embedder",
    "EvaluateConfig": "maekit.config.evaluate",
    "ExportConfig": "maekit.config.export",
    "FinetuneConfig": "maekit.config.finetune",
    "ImageError": "maekit.system.errors",
    "InputError": "maekit.system.errors",
    "InspectConfig": "maekit.config.check",
    "MaekitError": "maekit.system.errors",
    "NeighboursConfig": "maekit.config.pages",
    "PackConfig": "maekit.config.pack",
    "PretrainConfig": "maekit.config",
    "ReconstructConfig": "maekit.config.pages",
    "ReportConfig": "maekit.config.pages",
    "Stopped": "maekit.system.errors",
    "SweepConfig": "maekit.config.sweep",
    "check": "maekit.checking",
    "check_shards": "maekit.checking",
    "doctor": "maekit.diagnosis",
    "embed": "maekit.embedding.embed",
    "evaluate": "maekit.evaluation.evaluate",
    "export": "maekit.exporters.export",
    "find_shards": "maekit.shards.spec",
    "finetune": "maekit.finetuning.finetune",
    "inspect": "maekit.inspection",
    "neighbours": "maekit.pages.neighbours",
    "pack": "maekit.shards.pack",
    "pretrain": "maekit.pretraining.pretrain",
    "reconstruct": "maekit.pages.reconstruct",
    "report": "maekit.pages.report",
    "sweep": "maekit.sweeping",
    "verify": "maekit.exporters.verify",
}

__all__ = [
    "CheckConfig",
    "DoctorConfig",
    "EmbedConfig",
    "Embedder",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "ImageError",
    "InputError",
    "InspectConfig",
    "MaekitError",
    "NeighboursConfig",
    "PackConfig",
    "PretrainConfig",
    "ReconstructConfig",
    "ReportConfig",
    "Stopped",
    "SweepConfig",
    "__version__",
    "check",
    "check_shards",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "find_shards",
    "finetune",
    "inspect",
    "neighbours",
    "pack",
    "pretrain",
    "reconstruct",
    "report",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'maekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
