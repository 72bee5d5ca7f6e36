"""`maekit pack`."""

from dataclasses import asdict

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, say
from maekit.config.pack import PackConfig
from maekit.system.text import count


@configured(PackConfig)
def command(config: PackConfig) -> Summary:
    """Pack a folder of images into tar shards.

    Image bytes go in unchanged, in sorted order, the same bytes every time. The key is the path without its extension,
    dots in the name turned into underscores; a .json, .txt or .cls file of the same name rides along. Links are
    followed, hidden names are not. Labels go in as .cls members, class names into classes.txt. Beside each shard lies
    its index, with CRC-32s. After a kill, the same command resumes.
    """
    from maekit.shards.pack import pack
    from maekit.system.files import describe_bytes

    report = pack(config, make_progress())
    shards = f"{count('shard', len(report.shards))}, {describe_bytes(report.bytes)}"
    say(f"{count('image', report.samples)} in {shards}: {config.out}")
    if report.class_counts:
        shown = ", ".join(f"{name} {report.class_counts[name]}" for name in report.classes[:12])
        more = f", {len(report.classes) - 12} more" if len(report.classes) > 12 else ""
        say(f"classes: {shown}{more} (in {config.out}/classes.txt)")
    for number, what in ((report.unlabelled, "images have no label"), (report.empty, "image files hold no bytes")):
        if number:
            say(f"{number} {what}")
    for what, counts in (("riding along", report.sidecars), ("passed over", report.passed_over)):
        if counts:
            say(f"{what}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    say(f"next: maekit check {config.out} --images")
    yield {**asdict(report), "shards": len(report.shards)}
