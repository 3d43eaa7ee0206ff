"""The processes of a run, and which part of the work is this one's.

They form a mesh of four axes, of which all but one may have size 1:

    stage       parts of the layers (pipeline parallelism)
    replicate   groups that each hold the whole model
    shard       ranks of such a group, each with its share of every parameter
    tensor      ranks that share the heads and features of every layer

`replicate` and `shard` together are the data-parallel ranks: each has its own rows of the batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from memlib.config import Config, ConfigError

AXES = ("stage", "replicate", "shard", "tensor")


@dataclass(frozen=True)
class Ranks:
    """mesh: of the axes above, None if this process is the only one; device: of this process.

    files: all processes, for messages about checkpoints. These have a group of their own because a thread
    may write a checkpoint while the processes train.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    files: dist.ProcessGroup | None = None

    def size(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh[axis].size()

    def place(self, axis: str) -> int:
        """This process's place on an axis."""
        return 0 if self.mesh is None else self.mesh[axis].get_local_rank()

    @property
    def count(self) -> int:
        """Processes of the run."""
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return self.size("replicate") * self.size("shard")

    @property
    def data_rank(self) -> int:
        return self.place("replicate") * self.size("shard") + self.place("shard")

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.mesh is None or dist.get_rank() == 0

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a batch."""
        share = batch_size // self.data_size
        return slice(self.data_rank * share, (self.data_rank + 1) * share)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the data-parallel ranks and stages, equal on all processes."""
        if self.mesh is None:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        summed: list[float] = self.all_reduce(total, ["stage", "replicate", "shard"]).tolist()
        return summed

    def all_reduce(self, total: Tensor, axes: Sequence[str]) -> Tensor:
        """A tensor summed in place over the ranks along some axes."""
        for axis in axes:
            if self.mesh is not None and self.size(axis) > 1:
                dist.all_reduce(total, group=self.mesh.get_group(axis))
        return total

    def most(self, values: list[float]) -> list[float]:
        """The largest of all processes' values, equal on all."""
        if self.mesh is None:
            return values
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found: list[float] = largest.tolist()
        return found

    def gather(self, value: object, group: dist.ProcessGroup | None = None) -> list[object]:
        """The values of all processes, in the order of their ranks."""
        if self.mesh is None:
            return [value]
        found: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=group)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.mesh is not None:
            dist.barrier()


def join(config: Config) -> Ranks:
    """Join the processes that the launcher has started, as `config.parallel` says; alone, do nothing.

    torchrun and `accelerate launch` both say by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT who belongs to
    the run. Raises ConfigError for a number of processes that does not fit the configuration.
    """
    parallel = config.parallel
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_launch(config, world)
    device = torch.device(config.training.device)
    if device.type == "cuda" and device.index is None and world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1 and parallel.mixed_precision == "none":
        return Ranks(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(device, make_mesh(config, device, world), dist.new_group(backend="gloo"))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without a message to the others."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_mesh(config: Config, device: torch.device, world: int) -> DeviceMesh:
    """The mesh of `world` processes."""
    parallel = config.parallel
    stages, tensor = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    data = world // (stages * tensor)
    shard = {"ddp": 1, "fsdp": data, "hsdp": parallel.shard_size or 1}[parallel.distributed_strategy]
    return init_device_mesh(device.type, (stages, data // shard, shard, tensor), mesh_dim_names=AXES)


def check_launch(config: Config, world: int) -> None:
    """Raise ConfigError unless `world` processes fit the configuration."""
    parallel, batch = config.parallel, config.training.batch_size
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and parallel.distributed_strategy == "ddp":
        raise ConfigError(
            "parallel.distributed_strategy = 'ddp': Accelerate was asked for FSDP, and its plugin does not "
            "reach this loop (on CPU it would silently be DDP); set parallel.distributed_strategy=fsdp"
        )
    if parallel.num_gpus is not None and parallel.num_gpus != world:
        raise ConfigError(
            f"parallel.num_gpus = {parallel.num_gpus}: the launcher started {world}; use torchrun "
            f"--nproc-per-node {parallel.num_gpus} -m memlib train … (accelerate launch --cpu starts one "
            "process unless it is given --multi_cpu or a machine rank)"
        )
    model = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if world % model:
        raise ConfigError(
            f"{world} processes: tensor_parallel_size x pipeline_parallel_size = {model} must divide them"
        )
    data = world // model
    if data % (parallel.shard_size or 1):
        raise ConfigError(
            f"parallel.shard_size = {parallel.shard_size}: must divide the {data} data-parallel ranks"
        )
    parts = data * (parallel.pipeline_microbatches if parallel.pipeline_parallel_size > 1 else 1)
    if batch % parts:
        raise ConfigError(
            f"training.batch_size = {batch}: its rows are divided among {data} data-parallel ranks"
            + (f" and {parts // data} microbatches" if parts != data else "")
            + f"; use a multiple of {parts}"
        )
