"""A converted network: stem, DiffusionBlocks and head, with the original kept as context; what ``convert`` returns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from diffusionblocks.converter import adaln, blocks
from diffusionblocks.converter.adapter import Adapter, Rows
from diffusionblocks.converter.analysis import Analysis, analyse
from diffusionblocks.converter.capture import flatten
from diffusionblocks.converter.cut import GraphPiece, cut, cuts_around, cuts_of, narrowed
from diffusionblocks.converter.graph import GraphView, value
from diffusionblocks.converter.loop import only
from diffusionblocks.converter.lowrank import add_low_rank
from diffusionblocks.converter.mapped import is_mapped
from diffusionblocks.converter.masked_target import check_masked
from diffusionblocks.converter.residual import Found, find_trunk
from diffusionblocks.converter.samples import Samples, axes_or_first, batch_symbols, samples_of
from diffusionblocks.converter.sampling import Trace, filled_in, sample
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.targets import Target, renew_classifier
from diffusionblocks.converter.tasks import new_labels_target, target_of_task
from diffusionblocks.converter.token_target import check_causal
from diffusionblocks.converter.units import Unit
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput, BundleError
from torch import fx, nn
from torch.export import ExportedProgram

if TYPE_CHECKING:
    from diffusionblocks.export.bundle import NetworkParts

log = logging.getLogger(__name__)

Env = dict[str, torch.Tensor]


class ConvertedNetwork:
    """Stem, blocks and head of one network. Made by :func:`convert`; trained by ``finetune``; exported from :meth:`parts`.

    All inputs are batch first; z [N, d] and sigma [N] are float32. ``exact`` is the original function; ``denoise`` the sampler.
    """

    def __init__(self, analysis: Analysis, settings: Settings) -> None:
        self.analysis, self.settings = analysis, settings
        self.partition = analysis.partition
        self.input_names = analysis.captured.input_names
        original = analysis.captured.graph
        blocks.set_apart(original)
        pieces = cut(original, analysis.cuts)
        self.stem, self.contexts, self.head = pieces[0], pieces[1:-1], pieces[-1]
        self.stems: list[GraphPiece | None] = [None] * self.num_blocks
        self.heads: list[GraphPiece | None] = [None] * self.num_blocks
        target = target_of_task(self.head, settings, self.input_names, analysis.captured.example)
        if settings.new_labels:
            target = new_labels_target(self.head, target, settings)
        self.target: Target | None = None if self._late_head() else target
        self.blocks: list[blocks.Block] = []
        self.trained = [False] * self.num_blocks
        self.edges: tuple[float, ...] = ()
        self.densities: list[Any] = []
        if self.target is not None:
            count, overlap = self.num_blocks, settings.overlap
            self.edges, between = self.target.scheduled(settings.partition, count)
            around = list(pairwise(self.edges))
            self.densities = [between(*self.target.interval(*of, overlap, self.edges)) for of in around]
            try:
                self._make_blocks(self.target)
            except adaln.NotPerSample as error:
                log.warning("%s", error)
                self.target, self.edges, self.densities, self.blocks = None, (), [], []

    @property
    def num_blocks(self) -> int:
        return len(self.partition.counts)

    @property
    def noise_partition(self) -> str:
        """How the noise range is divided."""
        partition = self.settings.partition
        if self.target is not None:
            return self.target.partition_of(partition)
        return "equal-information" if partition == "auto" else partition

    def _make_blocks(self, target: Target) -> None:
        analysis, settings = self.analysis, self.settings
        graph = flatten(analysis.captured.graph)
        found = find_trunk(graph)
        if analysis.loop is None:
            cuts = cuts_of(found, self.partition)
        else:
            found = only(found, analysis.loop)
            cuts = cuts_around(found, analysis.loop.period)
        groups = [self._units(found, b) for b in range(self.num_blocks)]
        sizes = [_parameters_of(context.module) for context in self.contexts]
        if not target.enters:
            adaln.insert(
                graph,
                found,
                groups,
                target_dim=target.dim,
                positions=target.positions,
                every_position=target.causal,
                reads_z=target.reads_z,
                sigma_data=target.sigma_data,
                block_parameters=sizes,
                seed=settings.seed,
            )
        view, nodes = analysis.found.view, analysis.cuts.nodes
        for b, piece in enumerate(cut(graph, cuts)[1:-1]):
            if settings.tune == "lora":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(settings.seed * 1000003 + b)
                    add_low_rank(piece.module)
            elif settings.tune == "block":
                piece = blocks.borrowed_copy(piece)
            names = [self._value_name(n) for n in piece.inputs]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed * 1000003 + 500 + b)
                entry = _adapter(view, nodes[0], nodes[b]) if settings.context == "stem" else None
                readout = _adapter(view, nodes[b + 1], nodes[-1])
            carries = settings.context == "carry" and b < self.num_blocks - 1
            module, sides = blocks.compose(piece, names, entry, readout, carries=carries)
            units = tuple(unit.name or unit.add.name for unit in groups[b])
            self.blocks.append(blocks.Block(module, sides, units, sizes[b]))
            copied = blocks.own_copy if settings.scratch else blocks.borrowed_copy
            if settings.ends == "own":
                self.stems[b] = copied(self._stem_of(sides))
            if settings.ends == "own" or settings.new_labels:
                own = self.heads[b] = copied(self.head)
                if settings.new_labels:
                    renew_classifier(own.module, settings.new_labels, settings.seed * 1000003 + 900 + b)
        self._check_side_values()

    def _stem_of(self, sides: Sequence[str]) -> GraphPiece:
        """The stem with what a block of these side values and the head read alone: of a modulated network it makes every layer's modulation, a third of all weights."""
        read = {*sides, *self.input_names_of(self.head)[1:]}
        return narrowed(self.stem, {n for n in self.stem.outputs[1:] if self._value_name(n) in read})

    def _late_head(self) -> tuple[str, ...]:
        """What the head reads that only later blocks make: where there is any, earlier blocks have no head."""
        early = {*self.input_names, *self.output_names(self.stem)[1:]}
        return tuple(n for n in self.input_names_of(self.head)[1:] if n not in early)

    def _check_side_values(self) -> None:
        early = {*self.input_names, *self.output_names(self.stem)[1:]}
        if self.settings.context != "stem":
            return
        for b, block in enumerate(self.blocks):
            missing = [n for n in block.sides if n not in early]
            if missing:
                raise BadInput(
                    f"Block {b} needs {', '.join(missing)} from an earlier block, which the context stem does not run.",
                    hint="Use --context frozen or carry.",
                )

    def _value_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return str(node.target)
        return f"side_{node.name}"

    def input_names_of(self, piece: GraphPiece) -> tuple[str, ...]:
        """Names of a piece's inputs: ``stream`` first (but for the stem), then side values."""
        names = [self._value_name(n) for n in piece.inputs]
        is_stem = piece is self.stem or any(piece is own for own in self.stems)
        return tuple(names if is_stem else ["stream", *names[1:]])

    def axes_of(self, piece: GraphPiece) -> tuple[dict[int, int], ...]:
        """For each of a piece's inputs the dimensions that hold the batch, or a multiple of it."""
        symbols = batch_symbols(self.analysis.captured.graph.graph.nodes)
        return tuple(axes_or_first(value(n).shape, symbols) for n in piece.inputs)

    def fixed_outputs(self, piece: GraphPiece, names: Sequence[str] | None = None) -> tuple[str, ...]:
        """Those of a piece's outputs, by ``names`` or :meth:`output_names`, that have no batch, such as a loss."""
        named = zip(names or self.output_names(piece), piece.outputs, strict=True)
        return tuple(name for name, n in named if not axes_or_first(value(n).shape, frozenset()))

    def output_axes(self) -> tuple[dict[int, int], ...]:
        """The same for each of the network's outputs; none for one of the whole batch, such as a loss."""
        symbols = batch_symbols(self.analysis.captured.graph.graph.nodes)
        return tuple(axes_or_first(value(n).shape, symbols) for n in self.head.outputs)

    def side_axes(self) -> dict[str, dict[int, int]]:
        """The same for every value by its name, but for the stream."""
        pieces = (self.stem, *self.contexts, self.head)
        return {
            self._value_name(n): axes
            for piece in pieces
            for n, axes in zip(piece.inputs, self.axes_of(piece), strict=True)
        }

    def output_names(self, piece: GraphPiece) -> tuple[str, ...]:
        """Names of a stem's or context's outputs: ``stream_out`` first, then side values."""
        return ("stream_out", *(f"side_{n.name}" for n in piece.outputs[1:]))

    def inputs_env(self, inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | torch.Tensor) -> Env:
        if isinstance(inputs, torch.Tensor):
            inputs = (inputs,)
        if isinstance(inputs, Mapping):
            return {name: inputs[name] for name in self.input_names}
        return dict(zip(self.input_names, inputs, strict=True))

    def _step(self, piece: GraphPiece, env: Env) -> None:
        """Run a stem or context piece: its outputs join ``env``, the main one as ``stream``."""
        results = piece.module(*(env[name] for name in self.input_names_of(piece)))
        for name, result in zip(self.output_names(piece), results, strict=True):
            env["stream" if name == "stream_out" else name] = result

    def run_head(self, env: Env, stream: torch.Tensor, block: int | None = None) -> tuple[torch.Tensor, ...]:
        """The head (or a block's own) on a stream; all outputs."""
        own = None if block is None else self.heads[block]
        piece = self.head if own is None else own
        names = self.input_names_of(piece)[1:]
        outputs: tuple[torch.Tensor, ...] = piece.module(stream, *(env[name] for name in names))
        return outputs

    def run_stem(self, env: Env, block: int | None = None) -> None:
        """Put the stem's outputs into ``env`` (a block's own stem, where it has one)."""
        own = None if block is None else self.stems[block]
        self._step(self.stem if own is None else own, env)

    def run_context(self, env: Env, block: int) -> None:
        """One original block, unmodulated: moves ``env['stream']`` on by one block."""
        self._step(self.contexts[block], env)

    def run_block(
        self, env: Env, block: int, z: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f of one DiffusionBlock on ``env['stream']`` with z [N, d], sigma [N]; and its raw state where it carries."""
        outputs = self._apply(env, block, z, sigma)
        return self.run_head(env, outputs[0], block)[0], outputs[1] if len(outputs) > 1 else None

    def carried(self, env: Env, block: int, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
        """The raw state of one DiffusionBlock alone, where it carries."""
        outputs = self._apply(env, block, z, sigma)
        return outputs[1] if len(outputs) > 1 else None

    def _apply(self, env: Env, block: int, z: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        part = self.blocks[block]
        inputs = [blocks.differentiable(env[name]) for name in ("stream", *part.sides)]
        outputs: tuple[torch.Tensor, ...] = part.module(*inputs, z, sigma)
        return outputs

    @torch.no_grad()
    def exact(self, inputs: Any) -> tuple[torch.Tensor, ...]:
        """Stem, original blocks and head one after another: the original network's outputs, to the bit."""
        env = self.inputs_env(inputs)
        self.run_stem(env)
        for b in range(self.num_blocks):
            self.run_context(env, b)
        return self.run_head(env, env["stream"])

    @torch.no_grad()
    def denoise(
        self,
        inputs: Any,
        *,
        steps: int | None = None,
        start: str = "mean",
        read: str = "last",
        seed: int = 0,
        average: int = 1,
        trace: Trace | None = None,
    ) -> torch.Tensor:
        """Euler steps on the probability-flow ODE, block after block; the prediction in float32, as the runtime gives it. For a diffusion model
        :func:`generation.generate` is the sampler. For a masked language model the log-probabilities of its tokens, each row by the block whose share is hidden in it.

        Args:
            inputs: the model's inputs.
            steps: number of denoising steps, B where it is not given.
            start: ``mean`` (z = 0) or ``noise`` (z = sigma_max eps from ``seed``).
            read: the prediction of the ``last`` step, or the ``mean`` of the steps' (of their log-probabilities).
            average: number of noise draws whose predictions (their probabilities) are averaged.
            trace: called after each step with (step, block, sigma, prediction).
        """
        if self.require_target().denoiser is not None:
            raise BadInput("A diffusion model is sampled from by converter.generation.generate.", hint="Use that.")
        if self.require_target().masking is not None:
            return filled_in(self, inputs)
        plan = schedule.sampling_steps(self.edges, steps or self.num_blocks)
        draws = [
            sample(self, inputs, plan, start=start, read=read, seed=(seed, k), trace=trace) for k in range(average)
        ]
        return draws[0] if average == 1 else self.require_target().averaged(torch.stack(draws))

    def advance(self, env: Env, block: int, carried: torch.Tensor | None) -> None:
        """Move ``env`` past ``block``: by the original block, or in ``carry`` by the state the block itself made."""
        if carried is None or len(self.contexts[block].outputs) > 1:
            self.run_context(env, block)
        if carried is not None:
            env["stream"] = carried

    def units_of(self, block: int) -> tuple[Unit, ...]:
        """The residual units of one block: of recurrent depth those of one application."""
        return self._units(self.analysis.found, block)

    def _units(self, found: Found, block: int) -> tuple[Unit, ...]:
        start, loop = self.partition.starts[block], self.analysis.loop
        return found.trunk[start : start + (self.partition.counts[block] if loop is None else loop.period)]

    def own_tensors(self, block: int) -> dict[str, torch.Tensor]:
        """The tensors that training block ``block`` may change (its copies of stem and head, and batch statistics, among them), themselves."""
        state: dict[str, torch.Tensor] = {}
        for prefix, module in self.own_modules(block):
            tune = self.tune_of(prefix)
            wanted = blocks.trainable_names(module, tune)
            state |= {
                f"{prefix}.{name}": tensor
                for name, tensor in module.state_dict(keep_vars=True).items()
                if name in wanted or tune == "block"
            }
        return state

    def block_state(self, block: int) -> dict[str, torch.Tensor]:
        """A copy of :meth:`own_tensors`."""
        return {n: t.detach().clone().contiguous() for n, t in self.own_tensors(block).items()}

    def load_block_state(self, block: int, state: Mapping[str, torch.Tensor]) -> None:
        """Load what :meth:`block_state` gave; tensors in a mapped file stay there.

        Raises:
            BundleError: names or shapes that do not fit.
        """
        own = self.own_tensors(block)
        wrong = sorted(set(own) ^ set(state)) or sorted(n for n in own if own[n].shape != state[n].shape)
        if wrong:
            raise BundleError(
                f"The weights of block {block} do not fit: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}.",
                hint="They come from another conversion: convert the model again.",
            )
        for prefix, module in self.own_modules(block):
            for path, owner in module.named_modules():
                for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                    found = state.get(".".join(filter(None, (prefix, path, name))))
                    if found is None:
                        continue
                    data = found if is_mapped(found) else found.detach().clone()
                    if isinstance(tensor, nn.Parameter):
                        tensor.data = data
                    else:
                        setattr(owner, name, data)  # the original's own may be the same object

    def own_modules(self, block: int) -> list[tuple[str, fx.GraphModule]]:
        """The modules whose weights training this block may change: its own, and its copies of stem and head."""
        own = [("block", self.blocks[block].module)]
        own += [(n, p.module) for n, p in (("stem", self.stems[block]), ("head", self.heads[block])) if p is not None]
        return own

    def tune_of(self, prefix: str) -> str:
        """What is trained of one of :meth:`own_modules`: of a block what ``tune`` says, of its own stem and head everything."""
        return self.settings.tune if prefix == "block" else "block"

    def parts(self) -> NetworkParts:
        """The network taken apart for ``export_bundle``."""
        from diffusionblocks.converter.parts import network_parts

        return network_parts(self)

    def require_target(self) -> Target:
        if self.target is None and self._late_head():
            raise BadInput(
                f"The head reads {', '.join(self._late_head())}, which only later blocks make, so that earlier blocks have no head to train with.",
                hint="The bundle runs in the mode exact.",
            )
        if self.target is None:
            raise BadInput(
                "The model's first output is not a row of logits [N, K], so there is no label to denoise.",
                hint="The bundle runs in the mode exact. To train blocks say what the output is: --task features, regression, multi-label or classification.",
            )
        return self.target


def with_any_target(network: ConvertedNetwork) -> ConvertedNetwork:
    """The network, or where its task is ``auto`` and its output no row of logits, the same with its own features as target."""
    if network.target is not None or network.settings.task != "auto":
        return network
    return ConvertedNetwork(network.analysis, replace(network.settings, task="features"))


def _parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _adapter(view: GraphView, source: fx.Node, target: fx.Node) -> Adapter | Rows | None:
    a, b = tuple(value(source).shape[1:]), tuple(value(target).shape[1:])
    symbols = batch_symbols(source.graph.nodes)
    rows = [samples_of(view, node, symbols) or Samples(0) for node in (source, target)]
    if rows[0] != rows[1]:
        (few, of), (many, shape) = sorted(zip(rows, (a, b), strict=True), key=lambda pair: pair[0].repeat)
        if few != Samples(0) or many != Samples(0, many.repeat) or of != (many.repeat, *shape):
            raise adaln.NotPerSample(
                f"The samples of a batch lie otherwise in the state at one cut ({', '.join(map(str, value(source).shape))}) than at another "
                f"({', '.join(map(str, value(target).shape))}).",
                hint="Divide the units otherwise (--split), so that the cuts lie between whole layers.",
            )
        return Rows(many.repeat, fold=rows[1] == many)
    channels = adaln.stream_channel(view, source), adaln.stream_channel(view, target)
    if a == b and channels[0] == channels[1]:
        return None
    if not all(isinstance(s, int) for s in (*a, *b)):
        raise BadInput(
            f"The trunk's state has a dynamic shape ({a} against {b}) that a learned entry cannot match.",
            hint="Export the model with a fixed size, or use another number of blocks.",
        )
    return Adapter(a, channels[0], b, channels[1])


def convert(
    model: nn.Module | ExportedProgram,
    example: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    **settings: Any,
) -> ConvertedNetwork:
    """Rewrite a residual network into AdaLN-conditioned DiffusionBlocks.

    Args:
        model: a module (captured in eval mode) or an exported program with a dynamic batch.
        example: example inputs, batch first; or give ``input_shape`` (without the batch).
        settings: fields of :class:`Settings`: num_blocks, context, partition, evidence, tune, ends, overlap, split, scratch, seed.

    Raises:
        BadInput: with the reason and the way out.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> class Unit(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        ...     def forward(self, x):
        ...         return x + self.mlp(self.norm(x))
        >>> model = nn.Sequential(nn.Linear(8, 16), *(Unit() for _ in range(4)), nn.Linear(16, 10)).eval()
        >>> network = convert(model, input_shape=(8,), num_blocks=2)
        >>> x = torch.randn(5, 8)
        >>> bool((network.exact(x)[0] == model(x)).all())
        True
    """
    chosen = Settings.from_json(
        {"ends": "auto", **settings}
    )  # what is left out of a stored recipe is older than that choice
    found = analyse(
        model,
        example,
        input_shape=input_shape,
        num_blocks=chosen.num_blocks,
        split=chosen.split,
        recurrent=chosen.recurrent,
    )
    network = ConvertedNetwork(found, chosen)
    if network.target is not None and network.target.causal:
        check_causal(network)
    if network.target is not None and network.target.masking is not None:
        check_masked(network)
    return network
