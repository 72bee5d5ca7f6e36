"""`maekit doctor`."""

import sys
from typing import TYPE_CHECKING

import typer

from maekit.cli.options import Summary, configured, with_flags
from maekit.cli.show import plain, print_table, say
from maekit.config.check import DoctorConfig

if TYPE_CHECKING:
    from maekit.diagnosis import Finding, Rates


@configured(DoctorConfig)
def command(config: DoctorConfig) -> Summary:
    """Say what this machine has, what does not work on it, and what fixes that.

    Runs a small model on every provider of ONNX Runtime and compares the numbers, and writes into every folder that
    maekit needs. With ENCODER.ONNX, measures for about five seconds how many images this machine embeds; with SHARDS,
    also how many it decodes. Exits 1 when there is a problem; having no GPU is none.
    """
    from rich.console import Console

    from maekit.diagnosis import doctor

    # On a terminal alone, and gone with the result.
    with Console(stderr=True).status("looking"):
        diagnosis = doctor(config)
    rows = [(finding.subject, finding.value, "problem" if finding.problem else "") for finding in diagnosis.findings]
    print_table(("this machine", "", ""), rows)
    say()
    if diagnosis.rates:
        _print_rates(diagnosis.rates)
    _print_problems(diagnosis.problems)
    yield diagnosis.summary()
    if diagnosis.problems:
        raise typer.Exit(1)


def _print_rates(rates: "Rates") -> None:
    cores = f"{rates['cores']} core{'' if rates['cores'] == 1 else 's'}"
    rows = [("model", "session", cores, f"{rates['model']}, batches of {rates['batch_size']}")]
    if "limit" in rates:
        rows += [
            ("decode", "decode_one_core", "1 core", ""),
            ("decode", "decode_all_cores", cores, ""),
            ("embed at most", "limit", cores, "this model on this CPU, decoding included"),
        ]
    shown = [(what, _number(float(rates[key])), where, remark) for what, key, where, remark in rows]
    print_table(("images per second", "", "", ""), shown, right=(1,))
    say()


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def _print_problems(problems: "list[Finding]") -> None:
    from rich.console import Console
    from rich.text import Text

    if not problems:
        say("no problem found")
    console = Console(soft_wrap=not sys.stdout.isatty())
    for finding in problems:
        console.print(Text(plain(f"problem  {finding.subject}: {finding.problem}")))
        # Never folded: it is there to be copied.
        say(f"    fix  {with_flags(finding.fix or '')}")
