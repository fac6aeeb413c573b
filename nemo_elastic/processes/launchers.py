"""Which processes a launcher started, read from the environment: torchrun's variables, whole, or none of them.

Batch systems and earlier shells leave variables behind that libraries take for a launcher's: half of torchrun's set
makes a process believe that it is one of many, and wait for the others, or be silent because it is not the first. What
other launchers set (Slurm's, NODE_RANK) is never read.
"""

import os
from collections.abc import Mapping
from math import lcm

from ..problems import Problem, ProblemsError

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # may be there alone: a job script's own
# Launchers that start many processes without torchrun's variables: (number of tasks, number of this one).
OTHERS = {"srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")}


def started_processes() -> int:
    """Processes that torchrun started, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def data_parallel_size(
    processes: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> int:
    """Replicas of the model that so many processes run.

    Raises:
        ProblemsError: they do not fill the layout.
    """
    needed = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if processes < 1:
        raise ProblemsError([Problem("--nproc", f"{processes} must be at least 1")])
    if processes % needed:
        layout = f"tensor_model_parallel_size={tensor_model_parallel_size} x pipeline_model_parallel_size="
        layout += str(pipeline_model_parallel_size)
        if context_parallel_size > 1:
            layout += f" x context_parallel_size={context_parallel_size}"
        words = f"{layout} needs a multiple of {needed} processes, {processes} started; "
        raise ProblemsError([Problem("train", words + "use torchrun --nproc-per-node or --nproc")])
    ranks = processes // needed * context_parallel_size
    if ranks % expert_model_parallel_size:
        words = f"{expert_model_parallel_size} must divide the {ranks} data-parallel ranks of {processes} processes"
        words += f" (with {context_parallel_size} context-parallel ones each); " if context_parallel_size > 1 else "; "
        least = needed // context_parallel_size * lcm(context_parallel_size, expert_model_parallel_size)
        remedy = f"start a multiple of {least}, or set a divisor of {ranks}"
        raise ProblemsError([Problem("train.expert_model_parallel_size", words + remedy)])
    return processes // needed


def launcher_problems(environment: Mapping[str, str]) -> list[Problem]:
    """Why nobody can tell from `environment` which process of a run this is."""
    there = [name for name in RANKS if name in environment]
    if not there:
        return [
            Problem(size, f"{environment[size]}: {name} starts this program {environment[size]} times, each a whole "
                    "run; start one task a node, with torchrun in it, or use --nproc")
            for name, (size, number) in OTHERS.items()
            if number in environment and environment.get(size, "1").isdigit() and int(environment.get(size, "1")) > 1
        ]  # fmt: skip
    if {name: environment[name] for name in there} in ({"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}):
        return []  # one process, whoever says it: our own process groups and Lightning do
    if missing := [name for name in (*RANKS, *MEETING) if name not in environment]:
        words = f"without {', '.join(missing)}: left over from another launcher"
        return [Problem(", ".join(there), f"{words}; `unset {' '.join(there)}`, or start with torchrun or --nproc")]
    values = {name: environment[name] for name in RANKS}
    if not all(value.isdigit() for value in values.values()):
        return [Problem(", ".join(RANKS), f"{values} must be whole numbers; `unset {' '.join(RANKS)}`")]
    rank, local, world, here = (int(value) for value in values.values())
    if not (rank < world and local < here and here <= world and world % here == 0):
        words = f"rank {rank} of {world}, {local} of {here} on this machine, cannot be; `unset {' '.join(RANKS)}`"
        return [Problem("RANK", words)]
    return []
