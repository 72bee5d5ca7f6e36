"""maekit: tar shards -> masked autoencoder -> ONNX encoder -> embeddings."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from maekit.check import check_shards
    from maekit.config import PretrainConfig
    from maekit.embedding.embedder import Embedder
    from maekit.embedding.run import EmbedConfig, embed
    from maekit.errors import MaekitError
    from maekit.evaluation.options import EvaluateOptions
    from maekit.evaluation.run import evaluate
    from maekit.exporters.export import export
    from maekit.exporters.options import ExportOptions
    from maekit.exporters.verify import verify
    from maekit.gallery.neighbours import neighbours
    from maekit.gallery.options import NeighbourOptions, ReconstructOptions, ReportOptions
    from maekit.gallery.reconstruct import reconstruct
    from maekit.gallery.report import report
    from maekit.grid import sweep
    from maekit.shards.pack import PackOptions, pack
    from maekit.shards.spec import find_shards
    from maekit.training.run import pretrain

# Nothing heavy loads before it is used: `import maekit` must stay cheap for embedding workers and for `--help`.
_HOMES = {
    "EmbedConfig": "maekit.embedding.run",
    "Embedder": "maekit.embedding.embedder",
    "EvaluateOptions": "maekit.evaluation.options",
    "ExportOptions": "maekit.exporters.options",
    "MaekitError": "maekit.errors",
    "NeighbourOptions": "maekit.gallery.options",
    "PackOptions": "maekit.shards.pack",
    "PretrainConfig": "maekit.config",
    "ReconstructOptions": "maekit.gallery.options",
    "ReportOptions": "maekit.gallery.options",
    "check_shards": "maekit.check",
    "embed": "maekit.embedding.run",
    "evaluate": "maekit.evaluation.run",
    "export": "maekit.exporters.export",
    "find_shards": "maekit.shards.spec",
    "neighbours": "maekit.gallery.neighbours",
    "pack": "maekit.shards.pack",
    "pretrain": "maekit.training.run",
    "reconstruct": "maekit.gallery.reconstruct",
    "report": "maekit.gallery.report",
    "sweep": "maekit.grid",
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
