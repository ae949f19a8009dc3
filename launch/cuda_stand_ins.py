"""Let the CUDA build of torch load on a machine without the CUDA libraries (some 3 GB that a CPU never calls).

    VENV/bin/python launch/cuda_stand_ins.py

Beside torch's own libraries it puts one for each CUDA library that torch is linked to and that is not there. Every
function of it does nothing but return 1 (an error of all these libraries). Not stood in for: the CUDA runtime and CUPTI,
which are called on a CPU too; they must be installed (nvidia-cuda-runtime, nvidia-cuda-cupti: 13 MB).
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NAMES = re.compile(r"(cublas|cudnn|cufft|cuFile|curand|cusolver|cusparse|nccl|nvJit|nvrtc|nvshmem)\w+$")
LIBRARIES = re.compile(
    r"NEEDED.*\[(lib(?:cublas|cudnn|cufft|cufile|curand|cusolver|cusparse|nccl|nvJit|nvrtc|nvshmem)\S*)\]"
)
VERSION_NODES = {"libnvshmem_host.so.3": "NVSHMEM"}
"""The version of a library's symbols, where it is not the library's name."""


def printed(*command: str) -> list[str]:
    """The lines that a program prints. Raises CalledProcessError, FileNotFoundError."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def main() -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    folder = packages / "torch" / "lib"
    linked = [p for p in folder.glob("lib*.so") if re.match(r"lib(torch|c10|caffe2)", p.name)]
    needed = {m[1] for p in linked for line in printed("readelf", "-d", str(p)) if (m := LIBRARIES.search(line))}
    missing = sorted(needed - {p.name for p in packages.glob("nvidia/**/*.so*")})
    wanted = {
        line.split()[-1].split("@")[0] for p in linked for line in printed("nm", "-D", "--undefined-only", str(p))
    }
    with tempfile.TemporaryDirectory() as scratch:
        source, versions = Path(scratch, "stand_in.c"), Path(scratch, "versions")
        source.write_text(
            "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(filter(NAMES.match, wanted)))
        )
        for name in missing:
            versions.write_text(f"{VERSION_NODES.get(name, name)} {{ global: *; }};\n")
            options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
            printed("cc", *options, "-o", str(folder / name), str(source))
    print(f"stand-ins for {', '.join(missing) or 'nothing'}", file=sys.stderr)


if __name__ == "__main__":
    main()
