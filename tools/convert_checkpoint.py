"""`r1mega convert` by many processes at once: each writes its share of the output files.

mpirun -n 64 python tools/convert_checkpoint.py --to-megatron HF_DIR OUT --parallel tp=8,ep=32
srun --ntasks 64 python tools/convert_checkpoint.py --to-hf RUN_DIR OUT
torchrun --nproc-per-node 8 tools/convert_checkpoint.py --to-hf RUN_DIR OUT

Options are those of `r1mega convert`. Under mpirun and srun it needs mpi4py. The same command, with any number of
processes, goes on where one was stopped.
"""

from __future__ import annotations

import sys

from r1mega.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
