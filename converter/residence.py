"""Where a network's parts are while one block trains: that block, with stem and head, on the device; everything else in a file, or passing through.

On a CPU nothing moves: weights that lie in a mapped file are read from there, and their pages are given back after each pass. On another device frozen parts
are copied there for a pass and dropped behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter import mapped
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.runtime.errors import BadInput
from torch import fx, nn
from torch.utils import _pytree as pytree


def device_of(name: str) -> torch.device:
    """The device of this name, which is there.

    Raises:
        BadInput: it is not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"There is no device {name!r} here: {' '.join(str(error).split())[:200]}",
            hint="Use --device cpu, or install a torch that was built for the device.",
        ) from error
    return device


class Residence:
    """``folder``: where weights of blocks that are not in training are kept; None leaves them where they are."""

    def __init__(self, network: ConvertedNetwork, device: torch.device, folder: Path | None = None) -> None:
        self.network, self.device, self.folder = network, device, folder
        if folder is not None:
            for b in range(network.num_blocks):
                self.put_away(b)

    def put_away(self, b: int) -> None:
        """Block b's own weights into a file, mapped from there."""
        if self.folder is not None and self.network.blocks:
            self.folder.mkdir(parents=True, exist_ok=True)
            mapped.put_on_disk(self.network.own_modules(b), self.folder / f"resting_{b:02d}.safetensors")

    @contextmanager
    def active(self, b: int) -> Iterator[None]:
        """Block b with the stem and head that serve it on the device."""
        network = self.network
        own = [module for _, module in network.own_modules(b)]
        frozen = [
            p.module for p, o in ((network.stem, network.stems[b]), (network.head, network.heads[b])) if o is None
        ]
        with placed(own, self.device, kept=True), placed([*frozen, self._target()], self.device):
            yield

    def _target(self) -> nn.Module:
        return self.network.require_target()

    @contextmanager
    def passing(self, *modules: nn.Module) -> Iterator[None]:
        """Frozen ``modules`` on the device meanwhile."""
        with placed(modules, self.device):
            yield
        if self.device.type == "cpu":
            mapped.release(t for m in modules for t in (*m.parameters(), *m.buffers()))


@contextmanager
def placed(modules: Iterable[nn.Module], device: torch.device, *, kept: bool = False) -> Iterator[None]:
    """What ``modules`` hold on ``device`` meanwhile; with ``kept`` what it has become comes back, but for what lies in a mapped file."""
    if device.type == "cpu":
        yield
        return
    modules = list(modules)
    held = {id(t): (t, t.data) for m in modules for t in (*m.parameters(), *m.buffers())}
    said = [moved for m in modules for moved in _say_device(m, device)]
    for tensor, data in held.values():
        tensor.data = data.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, data in held.values():
            tensor.data = tensor.data.to(data.device) if kept and not mapped.is_mapped(data) else data
        for node, args, kwargs in said:
            node.args, node.kwargs = args, kwargs
        for graph in {n.graph.owning_module for n, _, _ in said}:
            if graph is not None:
                graph.recompile()


def _say_device(module: nn.Module, device: torch.device) -> Iterator[tuple[fx.Node, Any, Any]]:
    """Let operators that name a device name this one; gives what they said before."""
    for graph in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        changed = False
        for node in graph.graph.nodes:
            before = node.args, node.kwargs
            if any(isinstance(leaf, torch.device) for leaf in pytree.tree_leaves(before)):
                node.args, node.kwargs = pytree.tree_map(lambda v: device if isinstance(v, torch.device) else v, before)
                changed = True
                yield node, *before
        if changed:
            graph.graph.owning_module = graph
            graph.recompile()
