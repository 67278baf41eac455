"""Step every bucket in the backward pass and use its gradients' memory again.

(``--flash-gradient-release``.) A bucket group of DDP goes through four states in an iteration:

    IDLE      no gradient has come; its addresses may have the memory of another bucket behind them
    OPEN      its first gradient came: it has a slot of the pool to itself
    REDUCED   all gradients came, and Megatron has dispatched their reduce-scatter
    STEPPED   its step is launched; once that has run, the slot may be written for another bucket

The step of a bucket is launched when the next one has been dispatched, or its slot is needed: on
the stream of the backward pass, which by then seldom has to wait for the reduce-scatter.

Why on that stream, why no weight is stepped too early, and what is refused:
docs/gradient-release.md.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.utils import log_single_rank

from megatron_flashoptim.megatron import versions
from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.megatron.release.address_range import memory_of
from megatron_flashoptim.megatron.release.bucket_group import BucketGroup, State
from megatron_flashoptim.megatron.release.fused_wgrad import announce_gradients
from megatron_flashoptim.megatron.release.grad_pool import GradPool, Region

logger = logging.getLogger(__name__)


class GradientRelease:
    """Hooks itself into DDP's bucket groups and steps them.

    Args:
        chunks: model chunks wrapped in DDP, made with gradients without memory.
        members: the chain's members that have parameters.

    Attributes:
        groups: every bucket group.
        pool: memory of the gradients.

    Raises:
        ImportError: this release of Megatron counts gradients in another way.
    """

    def __init__(self, chunks: Sequence[Any], members: Sequence[FlashDistributedOptimizer]) -> None:
        flash = members[0].flash
        self._chunks = list(chunks)
        self._members = list(members)
        self._accepts_partial_step = flash.accept_partial_step
        self._device = torch.device(torch.cuda.current_device())
        self._current_raw_stream = _current_raw_stream_on(self._device)
        # Of the backward pass, on which buckets are stepped.
        self._stream = torch.cuda.current_stream()
        self._raw_stream = self._current_raw_stream()
        self.pool = GradPool(memory_of(self._device), flash.release_slots, self._warn)
        # Their steps wait for collectives that come behind any reduce-scatter dispatched before.
        self._steps_first = flash.bucket_clip_grad > 0 or any(
            chunk.ddp_config.num_distributed_optimizer_instances > 1 for chunk in chunks
        )
        # What is not stepped yet, oldest first.
        self._reduced: list[BucketGroup] = []
        self._stepping = False
        self._told = False
        memory = self._take_over_buffers(chunks)
        self.groups = [
            self._take_over(chunk, group, memory)
            for chunk in chunks
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        ]
        self._group_of = {region: entry for entry in self.groups for region in entry.regions}
        self._group_of_param = {param: entry for entry in self.groups for param in entry.names}
        self._announced: set[torch.nn.Parameter] = set()
        for chunk in chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.hook_parameters(
                    self._hook_of if chunk.config.gradient_accumulation_fusion else self._copying
                )
            if chunk.config.gradient_accumulation_fusion:
                announce_gradients(chunk.module, self._gradient_announced)
        of_bucket = {id(bucket): entry for entry in self.groups for bucket in entry.group.buckets}
        for member in members:
            member.optimizer.steps_elsewhere = True
            member.take_stats_of_shards()
            for index, bucket in enumerate(member.shard_buckets):
                of_bucket[id(bucket)].launches.append((member, index))

    def _warn(self, line: str) -> None:
        """Log what data-parallel ranks, which have the same buckets, have in common."""
        if self._members[0].data_parallel_group.rank() == 0:
            logger.warning("rank %d: %s", torch.distributed.get_rank(), line)

    def _take_over_buffers(
        self, chunks: Sequence[Any]
    ) -> dict[int, tuple[Region, list[torch.Tensor]]]:
        """Have the buffers' resets begin iterations.

        Returns each bucket's region, and what is zeroed in it, by its id.
        """
        memory: dict[int, tuple[Region, list[torch.Tensor]]] = {}
        for chunk in chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.on_reset = self.begin_iteration
                for bucket, region, padding in zip(
                    buffer.buckets, buffer.regions, buffer.padding(), strict=True
                ):
                    # Fused GEMMs add to what is there; all else is written over it.
                    adds = chunk.config.gradient_accumulation_fusion
                    memory[id(bucket)] = region, [bucket.grad_data] if adds else padding
        return memory

    def _take_over(
        self, chunk: Any, group: Any, memory: dict[int, tuple[Region, list[torch.Tensor]]]
    ) -> BucketGroup:
        entry = BucketGroup(group, group.finish_grad_sync, _event(), _event())
        for bucket in group.buckets:
            region, zeroed = memory[id(bucket)]
            entry.regions.append(region)
            entry.zeroed.append(zeroed)
        entry.names = {p: name for name, p in chunk.named_parameters() if p in group.params}
        for name in _SET_IN_GROUPS:
            if not hasattr(group, name):
                raise ImportError(
                    f"--flash-gradient-release needs {name} of DDP's bucket groups, which "
                    f"megatron-core {versions.installed_version()} does not have"
                )
        # Megatron learns from a first iteration how many gradients each parameter gets, and
        # reduces all buckets at its end. More than one is refused, see _gradient_comes.
        group.golden_per_param_grad_ready_counts = dict.fromkeys(group.params, 1)
        group.is_first_batch = False
        group.start_grad_sync = functools.partial(self._reduce, entry, group.start_grad_sync)
        group.finish_grad_sync = functools.partial(self._finish_reduce, entry)
        return entry

    # An iteration, in the order of calls.

    def begin_iteration(self) -> None:
        """Make all buckets idle, where Megatron zeroes gradients; again where there are several.

        Raises:
            RuntimeError: the update before was left in the middle.
        """
        if self._stepping:
            problem = self.partial_step()
            if not self._accepts_partial_step:
                raise RuntimeError(f"{problem} {_WHAT_TO_DO}")
            logger.warning("%s Training goes on, as --flash-accept-partial-step says.", problem)
            self._step_all_reduced()
            torch.cuda.synchronize()
            self._stepping = False
            for chunk in self._chunks:  # no optimizer.step() comes to do it
                chunk.start_param_sync(force_sync=True)
        if any(entry.state in (State.OPEN, State.REDUCED) for entry in self.groups):
            torch.cuda.synchronize()  # a backward pass failed; its slots are used for others now
        self._drop_reduced()
        self._stream, self._raw_stream = torch.cuda.current_stream(), self._current_raw_stream()
        self.pool.close_all()  # what a backward pass that failed has left open
        for entry in self.groups:
            entry.state = State.IDLE
            entry.arrived.clear()
        self._announced.clear()

    def partial_step(self) -> str | None:
        """Return what is wrong if an update was begun and not ended, else None."""
        if not self._stepping:
            return None
        if all(entry.state in (State.REDUCED, State.STEPPED) for entry in self.groups):
            return (
                "--flash-gradient-release: the backward pass has stepped every bucket, and no "
                "optimizer.step() came after it."
            )
        stepped = sum(entry.state is State.STEPPED for entry in self.groups)
        return (
            f"--flash-gradient-release: a backward pass ended with {stepped} of "
            f"{len(self.groups)} buckets stepped; weights and state are those of half an update."
        )

    def _hook_of(self, param: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        """Return what autograd calls when a gradient has come, before Megatron adds it.

        The host does this for every parameter in every iteration. So where the bucket is open for
        this stream and nothing is wrong, which is nearly always, it only notes the gradient.
        """
        entry = self._group_of_param[param]
        name, group = entry.names[param], entry.group
        arrived, streams, announced = entry.arrived, entry.streams, self._announced
        current_raw_stream = self._current_raw_stream

        def hook(_: torch.Tensor) -> None:
            if (
                entry.state is State.OPEN
                and current_raw_stream() in streams
                and name not in arrived
                and group.is_last_microbatch
                and (not getattr(param, "grad_added_to_main_grad", False) or param in announced)
            ):
                arrived.add(name)
            else:
                self._gradient_comes(param)

        return hook

    def _copying(self, param: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        """Return a hook that writes the gradient, which Megatron would add to zeros.

        Megatron is told so as it is by fused GEMMs.
        """
        note = self._hook_of(param)

        def hook(param: Any) -> None:
            note(param)
            # Megatron adds, whatever it is told; or another hook may change the gradient yet.
            adds = (
                getattr(param, "zero_out_wgrad", False)
                or len(param._post_accumulate_grad_hooks) > 1
                or param.grad.layout is not torch.strided
            )
            if adds:
                param.main_grad.zero_()
            else:
                param.main_grad.copy_(param.grad)
                param.grad_added_to_main_grad = True

        return hook

    def _gradient_comes(self, param: torch.nn.Parameter) -> None:
        """Check a gradient that Megatron is about to add, and open the bucket for it."""
        entry = self._group_of_param[param]
        name = entry.names[param]
        self._check_micro_batches(entry)
        self._check_unused(entry, param, is_first=name not in entry.arrived)
        self._check_announced(param)
        entry.arrived.add(name)
        self._make_open(entry)

    def _gradient_announced(self, param: torch.nn.Parameter) -> None:
        """Open the bucket of a parameter before a fused GEMM writes its gradient."""
        entry = self._group_of_param.get(param)
        if entry is None:
            return  # frozen
        self._check_micro_batches(entry)
        self._check_announced(param)
        # Where one that came before is unused, this may be the announcement of an outer module.
        self._check_unused(entry, param, is_first=True)
        self._announced.add(param)
        self._make_open(entry)

    @staticmethod
    def _check_unused(entry: BucketGroup, param: torch.nn.Parameter, *, is_first: bool) -> None:
        if not is_first or entry.state not in (State.IDLE, State.OPEN):
            raise RuntimeError(
                f"--flash-gradient-release: {entry.names[param]} got a second gradient after the "
                "first was used. Either several micro-batches were accumulated, or "
                "zero_grad_buffer() was not called after optimizer.step(), or the parameter is "
                "shared by layers that are recomputed one by one; drop the flag for such a model"
            )

    def _check_announced(self, param: torch.nn.Parameter) -> None:
        # A layer that writes main_grad itself says so to DDP, which resets it in each iteration.
        if getattr(param, "grad_added_to_main_grad", False) and param not in self._announced:
            name = self._group_of_param[param].names[param]
            raise RuntimeError(
                f"--flash-gradient-release: the gradient of {name} was written before its bucket "
                "had memory, by a layer other than the module that has it or is called with it; "
                "weights and state are not to be used. Give --no-gradient-accumulation-fusion"
            )

    @staticmethod
    def _check_micro_batches(entry: BucketGroup) -> None:
        if not entry.group.is_last_microbatch:
            raise RuntimeError(
                "--flash-gradient-release cannot accumulate several micro-batches: each would be "
                "stepped alone; use --micro-batch-size times the data-parallel size as "
                "--global-batch-size, or drop the flag"
            )

    def _make_open(self, entry: BucketGroup) -> None:
        """Have the current stream write gradients of a bucket group behind its opening."""
        if entry.state is State.IDLE:
            self._open(entry)
        raw_stream = self._current_raw_stream()
        if raw_stream not in entry.streams:  # shared experts, say, have a stream of their own
            stream = torch.cuda.current_stream()
            stream.wait_event(entry.opened)
            entry.streams[raw_stream] = stream

    def _open(self, entry: BucketGroup) -> None:
        """Give a bucket group memory, to be written once the bucket before has been stepped."""
        stream, raw_stream = torch.cuda.current_stream(), self._current_raw_stream()
        for region, zeroed in zip(entry.regions, entry.zeroed, strict=True):
            before = self.pool.open(region, entry.stepped.synchronize)
            if before is not None:
                user = self._group_of[before]
                self._step_reduced(upto=user)
                if raw_stream != self._raw_stream:
                    stream.wait_event(user.stepped)
            for view in zeroed:
                view.zero_()
        entry.opened.record(stream)
        entry.streams.clear()
        entry.streams[raw_stream] = stream
        entry.state = State.OPEN
        for param in entry.names:
            if getattr(param, "grad_added_to_main_grad", False):
                self._check_announced(param)

    def _reduce(
        self, entry: BucketGroup, start: Callable[..., None], force_all_reduce: bool = False
    ) -> None:
        """Stand in for Megatron's ``start_grad_sync``: all gradients of the group have come."""
        if self._steps_first:
            self._step_all_reduced()
        start(force_all_reduce=force_all_reduce)
        entry.state = State.REDUCED
        raw_stream = self._current_raw_stream()
        if raw_stream not in entry.streams:
            entry.streams[raw_stream] = torch.cuda.current_stream()
        # All that reads the bucket's weights is in these streams by now.
        for other, stream in entry.streams.items():
            if other not in entry.reduced:  # to make one each time takes longer
                entry.reduced[other] = _event()
            entry.reduced[other].record(stream)
        for region in entry.regions:
            self.pool.close(region)
        self._step_all_reduced()
        self._reduced.append(entry)

    def _step_all_reduced(self) -> None:
        if self._reduced:
            self._step_reduced(upto=self._reduced[-1])

    def _step_reduced(self, upto: BucketGroup) -> None:
        """Step what was put off, up to a bucket group, in the order of reduction."""
        while upto in self._reduced:
            self._step(self._reduced.pop(0))

    def _step(self, entry: BucketGroup) -> None:
        """Launch the step of a bucket group behind its reduce-scatter."""
        gather_dispatched = entry.group.param_gather_dispatched
        for raw_stream in entry.streams:
            if raw_stream != self._raw_stream:
                self._stream.wait_event(entry.reduced[raw_stream])
        with torch.cuda.stream(self._stream):
            if not self._stepping:
                self._begin_step()
            entry.finish_reduce()
            for member, index in entry.launches:
                member.launch_released(index)
            entry.stepped.record(self._stream)
        # Which has Megatron gather in the next forward pass, but also where a layer is recomputed.
        entry.group.param_gather_dispatched = gather_dispatched
        entry.state = State.STEPPED
        # Autograd now refuses, with an error, to use these weights where it has kept them.
        torch.autograd.graph.increment_version(list(entry.group.params))

    def _begin_step(self) -> None:
        self._stepping = True
        for member in self._members:
            member.begin_released_step()

    def _finish_reduce(self, entry: BucketGroup, force_all_reduce: bool = False) -> None:
        """Stand in for Megatron's ``finish_grad_sync``, after the backward pass."""
        self._step_reduced(upto=entry)
        if entry.state is not State.STEPPED:
            missing = [name for name in entry.names.values() if name not in entry.arrived]
            found = (
                f"{len(missing)} parameters got no gradient in this backward pass, as "
                f"--overlap-grad-reduce wants: {', '.join(missing[:4])}."
                if missing
                else f"Megatron has not reduced the bucket of {next(iter(entry.names.values()))}."
            )
            raise RuntimeError(
                f"--flash-gradient-release: {found} {self.partial_step() or ''}".rstrip()
            )
        entry.group.param_gather_dispatched = False

    def finish_step(self) -> None:
        """End the update, from ``optimizer.step()``: the compute stream waits for all launches.

        Raises:
            RuntimeError: not every bucket has been stepped.
        """
        if not (self._stepping or self._reduced):
            raise RuntimeError(
                "--flash-gradient-release: optimizer.step() came without a backward pass before "
                "it, in which buckets are stepped"
            )
        if any(entry.state not in (State.REDUCED, State.STEPPED) for entry in self.groups):
            raise RuntimeError(f"{self.partial_step()} {_WHAT_TO_DO}")
        # Where the caller has not finalized the gradients: what that does, see _finish_reduce.
        self._step_all_reduced()
        for entry in self.groups:
            entry.group.param_gather_dispatched = False
        torch.cuda.current_stream().wait_stream(self._stream)
        self._stepping = False
        if not self._told:
            self._told = True
            log_single_rank(logger, logging.INFO, self.describe())

    def forget(self) -> None:
        """Forget an update that was left in the middle: another state is loaded."""
        self._drop_reduced()
        self._stepping = False
        self.wait()

    def wait(self) -> None:
        """Have the host wait for all launches: another stream is to write what they write."""
        torch.cuda.synchronize()

    def _drop_reduced(self) -> None:
        """Drop what a backward pass that failed has reduced, and nobody has stepped."""
        for entry in self._reduced:
            entry.finish_reduce()
        self._reduced.clear()

    def describe(self) -> str:
        """Return one line: memory of gradients, and what they would take without release."""
        whole = sum(region.nbytes for entry in self.groups for region in entry.regions)
        return (
            f"gradient release: buckets: {len(self._group_of)}, of {whole / 1e6:.1f} MB together; "
            f"slots of memory for them: {len(self.pool.slots)}, of "
            f"{self.pool.memory.nbytes / 1e6:.1f} MB together"
        )


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types


def _current_raw_stream_on(device: torch.device) -> Callable[[], int]:
    """Return what tells the current streams of a device apart.

    ``torch.cuda.current_stream()`` makes an object, which takes longer than all else that is done
    for a gradient. On a GPU this is the stream's address, as Triton asks for it at each launch; on
    CPU ranks, the id of what stands in for a stream.
    """
    if device.type == "cuda":
        return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
    return lambda: id(torch.cuda.current_stream())


# Where another release had other names for these, setting them would do nothing.
_SET_IN_GROUPS = (
    *("golden_per_param_grad_ready_counts", "is_first_batch", "is_last_microbatch"),
    *("start_grad_sync", "finish_grad_sync", "param_gather_dispatched"),
)

_WHAT_TO_DO = (
    "Load the last checkpoint, or give --flash-accept-partial-step to go on from here: buckets "
    "that were not stepped then miss one update."
)
