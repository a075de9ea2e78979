"""Distributed training: joining the processes, sharing values between them, averaging gradients, votes.

In a run of one process the functions do nothing, so that their callers need not ask.
"""

from __future__ import annotations

import inspect
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from utils.config.schema import DeviceConfig
from utils.errors import LostError, TrainingError, UserError
from utils.processes.identity import identity_of
from utils.processes.interrupt import ends_at_once

T = TypeVar("T")
# How long processes wait for each other at the start, when no launcher watches them.
JOINING = timedelta(minutes=5)


@dataclass(frozen=True)
class Place:
    """This process's place among the processes of a run.

    Attributes:
        rank: from 0, over all machines; the first one writes the files.
        local_rank: from 0, on this machine; decides the GPU.
        world_size: number of processes.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0


def place(config: DeviceConfig, environment: Mapping[str, str]) -> Place:
    """This process's place, by the options and the variables that torchrun and others set.

    Raises:
        UserError: they contradict each other, or a part is missing or no number.
    """
    if not config.distributed and int_of(environment, "WORLD_SIZE", 1) == 1:
        return Place()
    world = _agreed(config.world_size, environment, "WORLD_SIZE", "world_size")
    rank = _agreed(config.rank, environment, "RANK", "rank")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} of {world} processes: ranks are counted from 0 to world_size - 1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and not environment.get(name):
            raise UserError(
                f"--distributed: the variable {name} is not set; set MASTER_ADDR to the machine of rank 0 and "
                "MASTER_PORT to a free port of it, or start with torchrun"
            )
    if world > 1 and not 0 < int_of(environment, "MASTER_PORT", 0) < 2**16:
        raise UserError(
            f"the variable MASTER_PORT is {environment['MASTER_PORT']}: set it to a port, 1 to 65535"
        )
    count = max(torch.cuda.device_count() if torch.cuda.is_available() else 0, len(config.ids), 1)
    return Place(rank, int_of(environment, "LOCAL_RANK", rank % count), world)


def int_of(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable that holds a number.

    Raises:
        UserError: it holds something else.
    """
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the variable {name} is {text!r}: set it to a number that is not negative")
    return int(text)


def _agreed(option: int | None, environment: Mapping[str, str], variable: str, name: str) -> int:
    """An option, or the variable that stands for it."""
    if option is None and variable not in environment:
        raise UserError(f"--distributed needs --{name}, or the variable {variable}; torchrun sets it")
    value = int_of(environment, variable, option or 0)
    if option is not None and option != value:
        raise UserError(
            f"--{name} {option} contradicts the variable {variable}, which is {value}: leave one out"
        )
    return value


def device_of(place: Place, config: DeviceConfig) -> tuple[torch.device, tuple[str, ...]]:
    """The GPU of this process, the CPU where there is none; and warnings.

    Raises:
        UserError: there are fewer GPUs than were asked for; the first alone is asked for by habit, and is a warning.
    """
    if not torch.cuda.is_available():
        asked = f"--device_ids {' '.join(map(str, config.ids))}: no GPU is available"
        if config.ids not in ((), (0,)):
            raise UserError(f"{asked}; write -g 0, or leave it out, to run on the CPU")
        return torch.device("cpu"), (f"{asked}, running on the CPU",) * len(config.ids)
    count = torch.cuda.device_count()
    missing = [index for index in config.ids if index >= count]
    if missing:
        raise UserError(f"--device_ids {missing[0]}: there are {count} GPUs, counted from 0")
    ids = config.ids or tuple(range(count))
    if place.local_rank >= len(ids):
        raise UserError(
            f"process {place.local_rank} of this machine, counted from 0, has no GPU of its own: there are "
            f"{len(ids)}; start as many processes"
        )
    return torch.device("cuda", ids[place.local_rank]), ()


@contextmanager
def joined(place: Place, device: torch.device, *, joining: timedelta = JOINING) -> Iterator[None]:
    """Join the processes of a run while the context is open: NCCL between GPUs, gloo between CPUs.

    Args:
        place: which of them this one is.
        device: its GPU, or the CPU.
        joining: how long to wait for the others without torchrun; torchrun itself ends all when one ends.

    Raises:
        TrainingError: they do not come together.
        LostError: another one ended.
    """
    if place.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with ends_at_once():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                rank=place.rank,
                world_size=place.world_size,
                store=_store(place, os.environ, joining),
            )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"process {place.rank} could not join the other {place.world_size - 1} at {address}: {error}"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise LostError(
            f"process {place.rank} lost the others; the error is that of the one that ended first"
        ) from error
    finally:
        distributed.destroy_process_group()


def _store(place: Place, environment: Mapping[str, str], joining: timedelta) -> Any:
    """The store through which the processes find each other; None: torchrun's."""
    address, port = environment["MASTER_ADDR"], int_of(environment, "MASTER_PORT", 0)
    tcp = distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = tcp(address, port, place.world_size, is_master=place.first, timeout=joining)
        compare_places(store, place)
        store.set_timeout(default_pg_timeout)  # all have joined
        return store
    restarts = int_of(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    if restarts == 0:
        return None
    # torchrun may keep its store, which then holds the addresses of the processes before the restart.
    store = tcp(address, port, is_master=False)
    return distributed.PrefixStore(f"restart {restarts}", store)  # pyright: ignore[reportPrivateImportUsage]


def compare_places(store: Any, place: Place) -> None:
    """Raise `UserError` unless all processes count as many and each rank is there once; otherwise they would wait."""
    if store.add(f"processes of rank {place.rank}", 1) > 1:
        raise UserError(f"another process of this run has --rank {place.rank} too: give each its own, from 0")
    store.set(f"world size of {place.rank}", str(place.world_size))
    for rank in range(place.world_size):
        size = int(store.get(f"world size of {rank}"))
        if size != place.world_size:
            sizes = sorted({rank: size, place.rank: place.world_size}.items())
            shown = "; ".join(f"{value} in process {number}" for number, value in sizes)
            raise UserError(
                f"the processes differ in --world_size ({shown}): start all of them with the number of all"
            )


def alone() -> bool:
    """Whether this is a run of one process."""
    return not distributed.is_initialized()


def broadcast(make: Callable[[], T]) -> T:
    """Call `make` in the first process; all processes return its result, or raise its `UserError`.

    Only the first process needs access to the files that a run writes.
    """
    if not distributed.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if distributed.is_initialized():
        value = value.clone()
        distributed.all_reduce(value)
    return value


def launchers(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Identify the torchrun of each machine by boot, PID and start time; empty without torchrun.

    They stay the same when torchrun restarts the processes, after a failure or because a machine came or went.
    Without /proc, the machine's name and torchrun's `--rdzv_id` stand for boot and start time.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ()
    parent = os.getppid()
    try:
        boot, started = identity_of(parent)
    except OSError:
        boot, started = socket.gethostname(), environment["TORCHELASTIC_RUN_ID"]
    return tuple(sorted(set(gathered(f"{boot} {parent} {started}"))))


def share_state(model: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first one.

    Without `--sync_bn` each process has its own batch statistics; the first one's are evaluated and saved.
    """
    if distributed.is_initialized():
        for value in model.state_dict().values():
            distributed.broadcast(value, 0)


def parallel(model: nn.Module, device: torch.device, *, may_skip: bool) -> nn.Module:
    """Wrap a network so that its gradients are means over all processes; unchanged in a run of one.

    Args:
        model: the network.
        device: where it is.
        may_skip: a pass may leave parameters out, the same ones in all processes. They then have no gradient, as in a
            run of one; finding them takes some time in every pass.
    """
    if not distributed.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    # No buffers are synchronised here: quantizers reduce theirs, and batch statistics are shared before use.
    known = inspect.signature(DistributedDataParallel).parameters
    # `broadcast_buffers` is the option's older name.
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    buffers: dict[str, Any] = {option: False}
    # The warning is about 1x1 kernels in channels-last order, whose strides can be written in two ways.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=may_skip, **buffers)


def reduction(network: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
    """The context of a pass: its gradients are reduced `now`, or by the last pass of its group."""
    if now or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


class Vote:
    """A question that all processes answer alike: yes when one of them says yes.

    An answer comes with the next question, so that nobody waits for it.
    """

    def __init__(self) -> None:
        self._pending: tuple[distributed.Work | None, Tensor] | None = None

    def __call__(self, mine: bool) -> bool:
        """Ask; every process asks as often as the others. Alone the answer is `mine`."""
        if not distributed.is_initialized():
            return mine
        answer = self.settled()
        flag = torch.tensor(int(mine))  # on the CPU, so that no device is waited for
        self._pending = distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True), flag
        return answer

    def settled(self) -> bool:
        """The answer to the last question."""
        if self._pending is None:
            return False
        work, flag = self._pending
        if work is not None:
            work.wait()
        return bool(flag)


def any_process(mine: bool) -> bool:
    """Whether one of the processes says yes; waits for all of them."""
    if not distributed.is_initialized():
        return mine
    flag = torch.tensor(int(mine))  # on the CPU, so that no device is waited for
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)
