"""Processes that share the pairs unevenly: `metric_worker.py CLIP OUT` writes OUT/RANK.safetensors.

The imports, which take most of the time, happen once; processes are forked before torch computes anything.
"""

import multiprocessing
import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARDS = [[2, 0, 5, 6, 1], [4, 3], []]  # the third has nothing at all
FAKES = runpy.run_path(str(Path(__file__).with_name("conftest.py")))


def work(rank: int, clip_folder: str, out: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{out}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(SHARDS))
    batch, results = FAKES["random_pairs"](7), {}
    for name, metric in FAKES["every_metric"](Path(clip_folder)).items():
        for row in SHARDS[rank]:
            metric.update(FAKES["select"](batch, [row]))
        results |= {f"{name}.{key}": value.contiguous() for key, value in metric.compute().items()}
    save_file(results, f"{out}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, *sys.argv[1:])) for rank in range(len(SHARDS))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
