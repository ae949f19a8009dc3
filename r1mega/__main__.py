"""`python -m r1mega`, what torchrun starts, and the `r1mega` command."""

from r1mega import cli, ending


def main() -> None:
    """Entry point."""
    ending.run(cli.main)


if __name__ == "__main__":  # a checkpoint's writer processes import this module again
    main()
