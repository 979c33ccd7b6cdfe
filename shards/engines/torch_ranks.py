"""Tensor parallelism: one process per rank, over ``torch.distributed``.

The plan of which weight is cut which way is the model's own (``base_model_tp_plan`` of its
configuration). A ``colwise`` linear layer computes a slice of its outputs, a ``rowwise`` one takes
a slice of its inputs and sums over the ranks, so a layer of the Llama kind sums twice. Heads, and
with them the KV cache, are split by the same cut. Logits are put together on every rank, so that
all of them draw the same token.

Sums are exact copies on all ranks: gloo and nccl reduce each part of a tensor at one place and
send the result around.

A rank that is gone fails the collective under way, which ends the engine in good order. Where
nothing is under way, or where the device waits without end, the connections that the ranks hold
beside it (``peers``) tell, and end the process.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional

from shards.engines import other_ranks
from shards.engines.base import EngineLost, EngineOptions, ModelError, Progress
from shards.engines.peers import Peers, PeersError
from shards.engines.torch_attention import NAME
from shards.engines.torch_devices import BACKENDS, Device
from shards.engines.torch_weights import Checkpoint

# How long ranks wait for each other to start and to load.
MEETING_S = 600.0
# The worker's exit code for a lost engine, and how long it has to leave in good order.
EXIT_LOST = 3
LEAVE_S = 1.5
_COLUMN, _ROW, _GATHERED = "colwise", "rowwise", "colwise_gather_output"
# Styles that leave a module as it is, whole on every rank; so are embeddings, whatever their style.
_WHOLE = ("replicated_with_grad_allreduce",)


class Ranks:
    """The group of processes that compute one model; with one rank it does nothing."""

    def __init__(self, options: EngineOptions, device: Device, peer_timeout_s: float) -> None:
        self.rank, self.world = options.rank, options.world
        self._group: Any = None
        self._peers: Peers | None = None
        self._lost = False
        if self.world == 1:
            return
        if not options.rendezvous:
            raise ModelError("torch: --world above 1 needs --rendezvous HOST:PORT")
        backend = BACKENDS.get(device.kind)
        if backend is None or not dist.is_backend_available(backend):
            raise ModelError(
                f"torch: this torch has no collectives for {device.kind}; serve with --num-shard 1"
            )
        if dist.is_initialized():
            raise ModelError("torch: a process can be a rank of one group only")
        try:
            self._peers = Peers(self.rank, self.world, options.rendezvous)
            self._peers.watch(_end)
            host = options.rendezvous.rpartition(":")[0]
            dist.init_process_group(
                backend,
                init_method=f"tcp://{host}:{self._peers.store_port}",
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=MEETING_S),
                device_id=device.torch if device.kind == "cuda" else None,
            )
            self._group = dist.new_group(timeout=timedelta(seconds=peer_timeout_s))
        except (PeersError, RuntimeError, ValueError) as error:
            raise ModelError(f"torch: the ranks did not meet: {_line(error)}") from error

    def least(self, value: int, device: Device) -> int:
        """The smallest value that any rank gives; also waits until all have loaded."""
        if self.world == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64, device=device.torch)
        try:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        except RuntimeError as error:
            raise ModelError(
                f"torch: another rank was lost while loading: {_line(error)}"
            ) from error
        return int(found.item())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the failure of a collective into ``EngineLost``."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1:
                raise
            self._lost = True
            raise EngineLost(
                f"rank {self.rank} of {self.world}: a collective failed, another rank is lost"
                f" or behind: {_line(error)}"
            ) from error

    def sum(self, tensor: Any) -> Any:
        """Adds up over the ranks, in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def joined(self, tensor: Any, total: int) -> Any:
        """Slices of the last dimension, put together; ``total`` is what they have in all."""
        width = -(-total // self.world)
        mine = functional.pad(tensor, (0, width - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine, group=self._group)
        return torch.cat(parts, dim=-1)[..., :total]

    def span(self, size: int) -> tuple[int, int]:
        """This rank's part of a dimension: all have the same, the last one perhaps less."""
        width = -(-size // self.world)
        return min(size, self.rank * width), min(size, (self.rank + 1) * width)

    def close(self) -> None:
        """Leaves the group, unless it is lost: then there is nobody to part from in good order."""
        if self._peers is not None:
            self._peers.close()
        if self._group is not None and not self._lost:
            dist.destroy_process_group()
            self._group = None


def _end(reason: str) -> None:
    """Ends this process, after a while in which the engine thread may find the loss by itself."""
    time.sleep(LEAVE_S)
    with suppress(OSError):
        sys.stderr.write(f"torch: {reason}\n")
        sys.stderr.flush()
    os._exit(EXIT_LOST)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


class RowLinear(nn.Module):  # type: ignore[misc]
    """A linear layer whose inputs are spread over the ranks."""

    def __init__(self, linear: Any, ranks: Ranks) -> None:
        super().__init__()
        self.linear, self.bias = linear, linear.bias
        linear.bias = None
        self._ranks = ranks

    def forward(self, x: Any) -> Any:
        """[..., in / world] to [..., out], the same on all ranks."""
        out = self._ranks.sum(self.linear(x))
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):  # type: ignore[misc]
    """A linear layer whose outputs are computed in parts and put together."""

    def __init__(self, linear: Any, ranks: Ranks, total: int) -> None:
        super().__init__()
        self.linear = linear
        self._ranks, self._total = ranks, total

    @property
    def weight(self) -> Any:
        """This rank's rows."""
        return self.linear.weight

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out], the same on all ranks."""
        return self._ranks.joined(self.linear(x), self._total)


def check_split(config: Any, world: int, where: str) -> None:
    """Raises ``ModelError`` if the heads of a model cannot be dealt out evenly."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % world or kv_heads % world:
        raise ModelError(
            f"model {where}: {heads} attention heads and {kv_heads} KV heads cannot be split"
            f" evenly over {world} ranks; {other_ranks(heads, kv_heads)}"
        )


Cut = tuple[int, int, int]
"""Which dimension of a tensor is cut, and from where to where."""


class Cuts:
    """Which part of which tensor this rank holds, from the plan of a model without weights."""

    def __init__(self, model: Any, ranks: Ranks, where: str) -> None:
        plan = {
            _pattern(name): style for name, style in (getattr(model, "tp_plan", None) or {}).items()
        }
        self.by_module: dict[str, str] = {}
        self._ranks = ranks
        for name, module in model.named_modules():
            style = next((s for pattern, s in plan.items() if pattern.fullmatch(name)), None)
            if style is None or style in _WHOLE or isinstance(module, nn.Embedding):
                continue
            if style not in (_COLUMN, _ROW, _GATHERED) or not isinstance(module, nn.Linear):
                raise ModelError(
                    f"model {where}: its plan for several ranks cuts {name} {style}, which the"
                    " torch engine cannot; serve with --num-shard 1"
                )
            self.by_module[name] = style
        if _ROW not in self.by_module.values():
            raise ModelError(
                f"model {where}: {model.config.model_type} has no plan for several ranks;"
                " serve with --num-shard 1"
            )

    def of(self, module_name: str, parameter: str, shape: Any) -> Cut | None:
        """The cut of one parameter; None if this rank holds all of it."""
        style = self.by_module.get(module_name)
        if style in (_COLUMN, _GATHERED):
            return (0, *self._ranks.span(shape[0]))
        if style == _ROW and parameter == "weight":
            return (1, *self._ranks.span(shape[1]))
        return None


def _pattern(name: str) -> re.Pattern[str]:
    """A plan's name, where a star stands for the number of a layer."""
    return re.compile(re.escape(name).replace(r"\*", r"\d+"))


def load_slice(
    checkpoint: Checkpoint, dtype: Any, device: Device, ranks: Ranks, progress: Progress
) -> Any:
    """This rank's part of a model, of which only that part is read from safetensors.

    A GGUF file is dequantised as a whole on each rank, and cut then.
    """
    if checkpoint.folder is None:
        whole = checkpoint.load(dtype, torch.device("cpu"), progress)
        cuts = Cuts(whole, ranks, checkpoint.where)
        for name, module in list(whole.named_modules()):
            for key, parameter in list(module.named_parameters(recurse=False)):
                _place(module, key, _taken(parameter.data, cuts.of(name, key, parameter.shape)))
        return _joined_up(whole, cuts, ranks).to(device.torch)
    model = _hollow(checkpoint, dtype)
    cuts = Cuts(model, ranks, checkpoint.where)
    _fill(model, checkpoint, cuts, lambda tensor: tensor.to(device.torch, dtype), progress)
    return _joined_up(model, cuts, ranks).to(device.torch)


def _hollow(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The model with buffers but without weights."""
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            checkpoint.config, dtype=dtype, attn_implementation="eager"
        )
    model.tie_weights()
    return model.eval()


def _fill(
    model: Any,
    checkpoint: Checkpoint,
    cuts: Cuts,
    convert: Callable[[Any], Any],
    progress: Progress,
) -> None:
    """Reads this rank's slices. A tied head is cut from the embedding, which every rank has."""
    held = checkpoint.weights()
    modules = dict(model.named_modules())
    wanted = [
        (name, module, key, tuple(parameter.shape))
        for name, module in modules.items()
        for key, parameter in module.named_parameters(recurse=False)
    ]
    embedding = next(n for n, m in modules.items() if m is model.get_input_embeddings())
    tied = model.config.get_text_config().tie_word_embeddings
    head = next(n for n, m in modules.items() if m is model.get_output_embeddings())
    lacking = []
    for done, (name, module, key, shape) in enumerate(wanted):
        source = f"{embedding}.weight" if tied and name == head else f"{name}.{key}"
        if source not in held:
            lacking.append(source)
            continue
        with checkpoint.opened(held[source]) as file:
            part = file.get_slice(source)
            if tuple(part.get_shape()) != shape:
                lacking.append(source)
                continue
            cut = cuts.of(name, key, shape)
            _place(module, key, convert(part[:] if cut is None else _sliced(part, cut)))
        progress(0.99 * (done + 1) / len(wanted))
    checkpoint.check_complete(lacking)


def _sliced(part: Any, cut: Cut) -> Any:
    dimension, start, end = cut
    return part[start:end] if dimension == 0 else part[:, start:end]


def _taken(tensor: Any, cut: Cut | None) -> Any:
    if cut is None:
        return tensor
    dimension, start, end = cut
    return tensor.narrow(dimension, start, end - start).contiguous()


def _place(module: Any, key: str, tensor: Any) -> None:
    setattr(module, key, nn.Parameter(tensor, requires_grad=False))


def _joined_up(model: Any, cuts: Cuts, ranks: Ranks) -> Any:
    """Puts the sums and the gathering where the plan wants them."""
    for name, style in cuts.by_module.items():
        module = model.get_submodule(name)
        if style == _ROW:
            model.set_submodule(name, RowLinear(module, ranks))
        elif style == _GATHERED:
            model.set_submodule(name, GatheredLinear(module, ranks, module.out_features))
    model.set_attn_implementation(NAME)
    return model
