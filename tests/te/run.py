"""`r1mega` with Transformer Engine over the stand-in:  python -m tests.te.run train configs/nano/zero.yaml model.fp8=blockwise ..."""

from tests.te import stand_in

if __name__ == "__main__":
    stand_in.install()

    from r1mega.cli import main

    main()
