"""`python -m r1mega`, and what torchrun starts."""

from r1mega.cli import main

if __name__ == "__main__":  # a checkpoint's writer processes import this module again
    main()
