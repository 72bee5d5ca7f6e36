"""maekit: tar shards -> masked autoencoder -> ONNX encoder -> embeddings."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maekit.version import __version__

if TYPE_CHECKING:
    from maekit.checking import check_shards
    from maekit.config import PretrainConfig
    from maekit.config.evaluate import EvaluateOptions
    from maekit.config.export import ExportOptions
    from maekit.config.pages import NeighbourOptions, ReconstructOptions, ReportOptions
    from maekit.embedding.embed import EmbedConfig, embed
    from maekit.embedding.embedder import Embedder
    from maekit.evaluation.evaluate import evaluate
    from maekit.exporters.export import export
    from maekit.exporters.verify import verify
    from maekit.pages.neighbours import neighbours
    from maekit.pages.reconstruct import reconstruct
    from maekit.pages.report import report
    from maekit.pretraining.pretrain import pretrain
    from maekit.shards.pack import PackOptions, pack
    from maekit.shards.spec import find_shards
    from maekit.sweeping import sweep
    from maekit.system.errors import MaekitError

# Nothing heavy loads before it is used: `import maekit` must stay cheap for embedding workers and for `--help`.
_HOMES = {
    "EmbedConfig": "maekit.embedding.embed",
    "Embedder": "maekit.embedding.embedder",
    "EvaluateOptions": "maekit.config.evaluate",
    "ExportOptions": "maekit.config.export",
    "MaekitError": "maekit.system.errors",
    "NeighbourOptions": "maekit.config.pages",
    "PackOptions": "maekit.shards.pack",
    "PretrainConfig": "maekit.config",
    "ReconstructOptions": "maekit.config.pages",
    "ReportOptions": "maekit.config.pages",
    "check_shards": "maekit.checking",
    "embed": "maekit.embedding.embed",
    "evaluate": "maekit.evaluation.evaluate",
    "export": "maekit.exporters.export",
    "find_shards": "maekit.shards.spec",
    "neighbours": "maekit.pages.neighbours",
    "pack": "maekit.shards.pack",
    "pretrain": "maekit.pretraining.pretrain",
    "reconstruct": "maekit.pages.reconstruct",
    "report": "maekit.pages.report",
    "sweep": "maekit.sweeping",
    "verify": "maekit.exporters.verify",
}

__all__ = [
    "EmbedConfig",
    "Embedder",
    "EvaluateOptions",
    "ExportOptions",
    "MaekitError",
    "NeighbourOptions",
    "PackOptions",
    "PretrainConfig",
    "ReconstructOptions",
    "ReportOptions",
    "__version__",
    "check_shards",
    "embed",
    "evaluate",
    "export",
    "find_shards",
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
