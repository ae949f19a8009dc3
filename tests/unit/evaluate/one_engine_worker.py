"""`r1mega` where a process can build one vLLM engine only, as on a GPU. Run as a script, with the command's arguments."""

from r1mega.cli import main
from r1mega.platform import vllm_cpu

if __name__ == "__main__":
    vllm_cpu.SEVERAL_ENGINES_A_PROCESS = False
    main()
