"""tools/probe_error_rates.py over the stand-in:  python -m tests.te.measure_probe RUN_OF_A_BASE/hf --fp8 blockwise"""

import runpy
from pathlib import Path

from tests.te import stand_in

if __name__ == "__main__":
    stand_in.install()
    runpy.run_path(str(Path(__file__).parents[2] / "tools/probe_error_rates.py"), run_name="__main__")
