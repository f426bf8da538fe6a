"""The command ``dbconvert generate``: a language model's bundle continues a text."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import click
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.files import checked_path
from diffusionblocks.runtime.hub import local_folder

TOKENIZER = "tokenizer/tokenizer.json"

log = logging.getLogger(__name__)


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--prompt", metavar="TEXT", help="The text to continue.")
@click.option("--prompt-tokens", metavar="5,17,2", help="The same as token numbers; numbers are printed then.")
@click.option(
    "--tokens",
    type=click.IntRange(0),
    help="How many to make.  [default: 64; of a masked language model what its length leaves room for]",
)
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="0: the likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--stop", metavar="TEXT|K", multiple=True, help="A token that ends the text, by its text or number.")
@click.option("--mode", type=click.Choice(["exact", "denoise"]), help="Default: the bundle's own.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Denoising steps a token, of a masked language model of all together. Default: the bundle's own.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--cache/--no-cache",
    "cached",
    default=None,
    help="Keep keys and values of past tokens.  [default: where the bundle can and the memory budget has room]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--memory-budget", metavar="256MiB", help="Bound on the graphs and weights open at once.")
def generate(
    bundle: str, prompt: str | None, prompt_tokens: str | None, device: str, memory_budget: str | None, **options: Any
) -> None:
    """Continue a text by BUNDLE, of a language model (--task lm), one block in memory at a time.

    A masked language model (--task mdm) also fills in its mask token where it stands in the prompt.

    \b
    Examples:
    dbconvert generate gpt2.dblocks --prompt "In the beginning" --tokens 40 --top-p 0.9
    dbconvert generate text.dblocks --prompt "In the [MASK] was the word" --tokens 0 --steps 8
    """
    bundle = str(local_folder(bundle))
    from diffusionblocks.runtime.bundle import open_bundle

    if (prompt is None) == (prompt_tokens is None):
        raise BadInput("There must be one prompt.", hint="Give --prompt TEXT or --prompt-tokens 5,17,2.")
    tokenizer = _tokenizer(Path(bundle)) if prompt is not None else None
    known = (
        _numbers(prompt_tokens) if tokenizer is None else list(tokenizer.encode(prompt, add_special_tokens=False).ids)
    )
    stop = [_token(text, tokenizer) for text in options.pop("stop")]
    with open_bundle(bundle, memory_budget=memory_budget, device=device) as opened:
        made = _made(opened, known, stop, options)
    click.echo(",".join(map(str, made[len(known) :])) if tokenizer is None else tokenizer.decode(made))


def _made(opened: Any, known: list[int], stop: list[int], options: dict[str, Any]) -> list[int]:
    """The prompt and what follows it."""
    from diffusionblocks.runtime.infilling import fill
    from diffusionblocks.runtime.language import generate as continued

    target, count = opened.manifest.target, options.pop("tokens")
    masking = None if target is None else target.masking
    if masking is None:
        most = 0 if target is None or not target.positions else target.positions[0]
        if most and len(known) > most:
            log.warning(
                "the prompt has %d tokens; the model was converted for %d, so it sees the last of them",
                len(known),
                most,
            )
        return [
            *known,
            *continued(opened, [known[-most:]], 64 if count is None else count, stop=stop, **options)[0].tolist(),
        ]
    if stop:
        raise BadInput(
            "A masked language model makes its tokens in no order, so none can end them.", hint="Leave --stop out."
        )
    room = target.dim - len(known)
    count = min(64, max(room, 0)) if count is None else count
    if count > room:
        raise BadInput(
            f"The prompt has {len(known)} tokens and {count} are to follow; the model was converted for {target.dim}.",
            hint="Give fewer --tokens, or a shorter prompt.",
        )
    rest = 0 if masking.mask else room - count  # what cannot be left out is filled in too
    if options.pop("cached"):
        raise BadInput(
            "A masked language model computes every position anew in each step, so there is nothing to keep.",
            hint="Leave --cache out.",
        )
    window = [*known, *[masking.token] * (count + rest)]
    found: list[int] = fill(opened, [window], **options)[0, : len(known) + count].tolist()
    return found


def _tokenizer(bundle: Path) -> Any:
    file, files = bundle / TOKENIZER, manifests.read(bundle).files
    if TOKENIZER in files:
        checked_path(bundle, TOKENIZER, files)
    else:
        raise BadInput(
            f"{bundle} holds no {TOKENIZER}.",
            hint="Give --prompt-tokens, or convert the model from a folder that has one.",
        )
    try:
        return importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except ModuleNotFoundError as error:
        raise BadInput("The package tokenizers is not installed.", hint="Install it: pip install tokenizers") from error
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BadInput(f"{file} cannot be read: {error}", hint="Convert the model again.") from error


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in (text or "").split(",")]
    except ValueError as error:
        raise BadInput(f"--prompt-tokens {text} is no list of numbers.", hint="Write it like 5,17,2.") from error


def _token(text: str, tokenizer: Any) -> int:
    found = None if tokenizer is None else tokenizer.token_to_id(text)
    if found is not None:
        return int(found)
    if text.isdigit():
        return int(text)
    raise BadInput(f"--stop {text} is no token.", hint="Give a token of the tokenizer, such as </s>, or its number.")
