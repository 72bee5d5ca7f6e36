"""`python -m maekit`, and the `maekit` command."""

from maekit.cli.program import program


def main() -> None:
    """Run the command line, from its imports on with streams and signals in hand."""
    with program(ends=True):
        from maekit.cli.app import main as command

        command()


if __name__ == "__main__":
    main()
