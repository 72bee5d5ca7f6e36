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

# Type checkers read this list, so it must be of literals.
__all__ = ["Embedder", "__version__", "check_shards", "find_shards"]
__all__ += ["ImageError", "InputError", "MaekitError", "Stopped"]
__all__ += ["CheckConfig", "DoctorConfig", "EmbedConfig", "EvaluateConfig", "ExportConfig", "FinetuneConfig"]
__all__ += ["InspectConfig", "NeighboursConfig", "PackConfig", "PretrainConfig", "ReconstructConfig", "ReportConfig"]
__all__ += ["SweepConfig", "check", "doctor", "embed", "evaluate", "export", "finetune", "inspect", "neighbours"]
__all__ += ["pack", "pretrain", "reconstruct", "report", "sweep", "verify"]

# The names of each module. Nothing heavy loads before it is used: `import maekit` must stay cheap for embedding workers
# and for `--help`.
_NAMES = {
    "checking": ["check", "check_shards"],
    "config": ["PretrainConfig"],
    "config.check": ["CheckConfig", "DoctorConfig", "InspectConfig"],
    "config.embed": ["EmbedConfig"],
    "config.evaluate": ["EvaluateConfig"],
    "config.export": ["ExportConfig"],
    "config.finetune": ["FinetuneConfig"],
    "config.pack": ["PackConfig"],
    "config.pages": ["NeighboursConfig", "ReconstructConfig", "ReportConfig"],
    "config.sweep": ["SweepConfig"],
    "diagnosis": ["doctor"],
    "embedding.embed": ["embed"],
    "embedding.embedder": ["Embedder"],
    "evaluation.evaluate": ["evaluate"],
    "exporters.export": ["export"],
    "exporters.verify": ["verify"],
    "finetuning.finetune": ["finetune"],
    "inspection": ["inspect"],
    "pages.neighbours": ["neighbours"],
    "pages.reconstruct": ["reconstruct"],
    "pages.report": ["report"],
    "pretraining.pretrain": ["pretrain"],
    "shards.pack": ["pack"],
    "shards.spec": ["find_shards"],
    "sweeping": ["sweep"],
    "system.errors": ["ImageError", "InputError", "MaekitError", "Stopped"],
}
_HOMES = {name: f"maekit.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'maekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
