"""`maekit check`."""

from typing import TYPE_CHECKING

import typer

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, print_table, say
from maekit.config.check import CheckConfig
from maekit.system.errors import InputError
from maekit.system.text import count

if TYPE_CHECKING:
    from maekit.checking import CheckReport, ImageReport, ShardReport

_ROWS = 20  # a longer table is cut to what needs looking at
_REMARKS = {
    "duplicates": "keys stand in more than one shard (a sample is named by its shard too, so nothing is lost)",
    "without_image": "samples hold no image",
    "refused": "samples have a member that is refused (a link, a name that is not UTF-8 or leads out of the archive)",
    "several": "samples have several images: choose one by --image, or such shards are refused",
    "unused_images": "images are the image of no sample",
    "ignored": "members belong to no sample (no extension, hidden, or metadata)",
    "stale_indexes": "indexes beside shards are of other files (--write-index renews them)",
}


@configured(CheckConfig)
def command(config: CheckConfig) -> Summary:
    """Scan shards strictly: samples, bytes, damage, duplicate keys.

    Every tar header is checked and every byte accounted for. Where an index with CRC-32s lies beside a shard, every
    member is compared with it. Exits 1 when any shard is damaged, or with --images any image, with one line for each
    damaged shard that says where and why.
    """
    from maekit.checking import check

    report = check(config, make_progress())
    for shard in report.damaged:
        assert shard.damage is not None
        what = "unreadable  {}:" if shard.unreadable else "damaged  {}  at byte {}:"
        say(f"{what.format(shard.name, shard.damage.offset)} {shard.damage.reason}", error=True)
    _print_shards(report)
    summary, images = report.summary(), report.images
    if images is not None and config.images:
        _print_images(images)
    else:
        summary.pop("images", None)
    if images is not None and config.stats and images.decoded:
        _print_stats(images)
    else:
        summary.pop("stats", None)
    yield summary
    if not report.samples and not report.damaged:
        raise InputError(f"{' '.join(config.shards)}: no sample at all")
    if report.damaged or (images is not None and config.images and images.failed):
        raise typer.Exit(1)


def _remark(shard: "ShardReport") -> str:
    """Return what needs looking at in a shard; empty where nothing does."""
    parts = ["unreadable" if shard.unreadable else "damaged"] if shard.damage else []
    if not shard.samples and not shard.damage:
        parts.append("no sample")
    counts = {
        "without image": shard.without_image,
        "refused": shard.refused,
        "with several images": shard.several,
        "images unused": sum(shard.unused.values()) - shard.ignored,
        "members ignored": shard.ignored,
    }
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    if shard.stale_index:
        parts.append("stale index")
    return ", ".join(parts)


def _print_shards(report: "CheckReport") -> None:
    from maekit.system.files import describe_bytes

    shown = report.shards
    if len(shown) > _ROWS:
        shown = [shard for shard in shown if _remark(shard)]
    rows = [
        (
            shard.name,
            shard.samples,
            describe_bytes(shard.bytes),
            _counts(shard.extensions),
            _remark(shard) or ("CRC-32s verified" if shard.verified else ""),
        )
        for shard in shown[:_ROWS]
    ]
    if rows:
        print_table(("shard", "samples", "size", "members", ""), rows, right=(1, 2))
    if len(shown) > _ROWS:
        say(f"… and {len(shown) - _ROWS} more shards with remarks")
    if hidden := len(report.shards) - len(shown):
        say(f"{count('shard', hidden)} without remarks not shown")
    unreadable = sum(shard.unreadable for shard in report.shards)
    say(
        f"{count('sample', report.samples)} in {count('shard', len(report.shards))}, {describe_bytes(report.bytes)}; "
        f"{len(report.damaged) - unreadable} damaged" + (f", {unreadable} unreadable" if unreadable else "")
    )
    summary = report.summary()
    for key, what in _REMARKS.items():
        if summary[key]:
            say(f"{summary[key]} {what}")


def _print_images(images: "ImageReport") -> None:
    rows = [
        ("decoded", images.decoded),
        ("formats", _counts(images.formats)),
        ("modes", _counts(images.modes)),
    ]
    for name in ("width", "height"):
        spread = images.summary()[name]
        rows.append((name, "{min} to {max}, median {median}".format(**spread) if isinstance(spread, dict) else ""))
    rows.append(("failed", f"{images.failed}  {_counts(images.failures)}".rstrip()))
    print_table(("images", ""), rows)
    for failure in images.examples[:_ROWS]:
        say(f"  {failure.shard}  {failure.key}  {failure.reason}: {failure.detail}")
    if images.failed > _ROWS:
        say(f"  … and {images.failed - _ROWS} more (--json lists 1,000)")


def _print_stats(images: "ImageReport") -> None:
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (images.mean, images.std))
    say(f"mean {mean}   std {std}   (red, green, blue, in [0, 1]; every image weighs the same)")
    say(f"for training: --set 'data.mean=[{mean}]' --set 'data.std=[{std}]'")


def _counts(counts: dict[str, int]) -> str:
    """Return counts in one line, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return ", ".join(f"{key} {count}" for key, count in ordered[:6]) + more
