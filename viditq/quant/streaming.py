"""From a checkpoint to an artifact without the model in between: a Linear at a time is read, quantized and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from viditq.errors import UserError
from viditq.mapped import header_bound, is_finite, release
from viditq.quant.artifact_writer import SHARD_BYTES, ArtifactWriter, Content, content_of, in_shards
from viditq.quant.convert import Conversion
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.model_linears import tied_names
from viditq.work_folder import held, work_folder


@dataclass(frozen=True)
class Unit:
    """What is made and written at once: layers of one turn, or one tensor that stays in float. shapes, nbytes: of what
    it leaves in the file, at most.
    """

    layers: tuple[str, ...]
    shapes: Mapping[str, Sequence[int]]
    nbytes: int


class Streaming:
    """The shards of an artifact, each made on its own, in any order and by any process, always to the same bytes.

    conversion: of a denoiser whose tensors may lie in files. dtypes: names of its parameters and buffers -> the type
    they run in, where that is another than the one they have.
    """

    def __init__(
        self, conversion: Conversion, dtypes: Mapping[str, torch.dtype], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._conversion, self._dtypes = conversion, dtypes
        self._state = conversion.denoiser.state_dict(keep_vars=True)
        names = {id(linear): name for name, linear in conversion.linears.items() if name in conversion.plan.layers}
        self._prefixes: dict[str, list[str]] = {}  # a Linear reached by two names is stored under both
        for prefix, module in conversion.denoiser.named_modules(remove_duplicate=False):
            if id(module) in names:
                self._prefixes.setdefault(names[id(module)], []).append(prefix)
        self._tied = tied_names(conversion.denoiser)
        units = [*self._units()]
        self.shards = in_shards([(unit, unit.nbytes) for unit in units], shard_bytes)

    def _units(self) -> Iterator[Unit]:
        """In the order of the model."""
        turn_of = {name: names for names in self._conversion.turns for name in names}
        layer_of = {prefix: name for name, prefixes in self._prefixes.items() for prefix in prefixes}
        seen: set[str] = set()
        for name, tensor in self._state.items():
            layer = layer_of.get(name.rpartition(".")[0])
            if layer is None and name in self._tied:
                yield Unit((), {name: ()}, 0)
            elif layer is None:
                nbytes = tensor.numel() * min(tensor.itemsize, self._dtypes.get(name, tensor.dtype).itemsize)
                yield Unit((), {name: tensor.shape}, nbytes)
            elif layer not in seen:
                seen |= {*turn_of[layer]}
                yield self._unit(turn_of[layer])

    def _unit(self, turn: Sequence[str]) -> Unit:
        empty = {prefix: self._conversion.empty(name) for name in turn for prefix in self._prefixes[name]}
        tensors = {
            key: t for prefix, layer in empty.items() for key, t in layer.state_dict(prefix=f"{prefix}.").items()
        }
        return Unit(
            tuple(turn), {name: t.shape for name, t in tensors.items()}, sum(t.nbytes for t in tensors.values())
        )

    def num_weights(self, index: int) -> int:
        """Of a shard, those that are quantized."""
        return sum(self._conversion.linears[name].weight.numel() for unit in self.shards[index] for name in unit.layers)

    def header_bytes(self, index: int) -> int:
        """What a shard's header takes at most."""
        shapes = {name: shape for unit in self.shards[index] for name, shape in unit.shapes.items()}
        return header_bound(shapes, sum(unit.nbytes for unit in self.shards[index]))

    def contents(self, index: int, on_layer: Callable[[int], None] | None = None) -> Iterator[Content]:
        """The tensors of one shard, each let go of when the next is asked for.

        on_layer: called after each turn with the number of weights it had. Raises UserError for NaN or inf in a weight.
        """
        for unit in self.shards[index]:
            if not unit.layers:
                yield self._kept(next(iter(unit.shapes)))
                continue
            self._conversion.check_finite(unit.layers)
            layers = self._conversion.quantized(unit.layers)
            yield self._quantized({p: layers[name] for name in unit.layers for p in self._prefixes[name]})
            del layers  # before the next ones are made
            weights = [self._conversion.linears[name].weight for name in unit.layers]
            release(weights)
            if on_layer is not None:
                on_layer(sum(weight.numel() for weight in weights))

    def _quantized(self, layers: Mapping[str, QuantLinear]) -> Content:
        content = content_of(layers)
        tensors, runs = dict(content.tensors), dict[str, torch.dtype]()
        for prefix, layer in layers.items():
            same = [f"{prefix}.bias"] if layer.bias is not None else []
            same += [f"{prefix}.variants.{i}.weight" for i, v in enumerate(layer.variants) if _keeps_weight(v)]
            for name in same:
                source = f"{prefix}.{name.rpartition('.')[2]}"
                stored, runs_in = self._types(source)
                tensors[name] = self._state[source].detach().to(stored)
                runs |= {name: runs_in} if runs_in else {}
        return Content(tensors, runs, content.dtypes)

    def _kept(self, name: str) -> Content:
        if name in self._tied:
            return Content({}, equal={name: self._tied[name]})
        tensor = self._state[name].detach()
        dtype = self._dtypes.get(name, tensor.dtype)
        if not is_finite(tensor, dtype):
            raise UserError(
                f"{name} contains NaN or inf as {str(dtype).removeprefix('torch.')}; check the checkpoint and its dtype"
            )
        stored, runs_in = self._types(name)
        return Content({name: tensor}, {name: runs_in} if runs_in else {}, casts={name: stored})

    def _types(self, name: str) -> tuple[torch.dtype, torch.dtype | None]:
        """What stays in float is stored as in the checkpoint, unless it runs in a narrower type; that it runs in."""
        stored = self._state[name].dtype
        runs = self._dtypes.get(name, stored)
        return (runs, None) if runs.itemsize <= stored.itemsize else (stored, runs)


def _keeps_weight(variant: Any) -> bool:
    return variant.weight is not None and not variant.chain


def quantize_to(
    folder: str | Path,
    conversion: Conversion,
    dtypes: Mapping[str, torch.dtype],
    meta: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the artifact of a plan, as `save_denoiser` would of the whole denoiser, in this process alone.

    dtypes: as of `Streaming`. meta: JSON values about where the model comes from. A killed call goes on where it was.
    """
    folder, streaming = Path(folder), Streaming(conversion, dtypes, shard_bytes)
    writer = ArtifactWriter(folder, work_folder(folder), len(streaming.shards))
    with held(writer.work):
        for index in writer.begin({"plan": conversion.plan.to_json(), "meta": dict(meta)}):
            writer.write(index, streaming.header_bytes(index), streaming.contents(index))
        writer.finish(conversion.plan, meta, conversion.context.timestep_scale)
