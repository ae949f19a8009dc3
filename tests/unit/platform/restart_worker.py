"""Run under torchrun: ranks that meet, start themselves anew twice, and meet again each time."""

import os

import torch
import torch.distributed as dist

from r1mega.platform import groups
from r1mega.platform.launcher import prepare_restart, reserve_port, restart

if __name__ == "__main__":
    times = int(os.environ.get("STARTED_BEFORE", "0"))
    groups.init_distributed()
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"start {times} rank {dist.get_rank()} pid {os.getpid()} sum {int(total)}", flush=True)
    if times < 2:
        os.environ["STARTED_BEFORE"] = str(times + 1)
        port = [reserve_port() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(port, src=0)
        prepare_restart(port[0])
        dist.barrier()
        groups.destroy()
        restart()
    dist.barrier()
    groups.destroy()
