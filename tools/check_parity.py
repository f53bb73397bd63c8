"""Where a Megatron checkpoint and a Hugging Face model part, layer by layer.

python tools/check_parity.py --hf HF_DIR --megatron DIR [--prompts FILE]

Both run in fp32 on this machine, one after the other, so memory for one of them is enough. The exit status
is 0 when no log-probability differs by more than --tolerance, and 1 otherwise.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import ConversionError, DataError, MegatronRLError
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.weights.layout import hf_shapes
from megatron_rl.weights.open import find_model_folder

ATTENTION, FEED_FORWARD, LAYER = "attention", "feed-forward", "layer"
EMBEDDING, FINAL_NORM, LOGITS, LOGPROBS = "embedding", "final norm", "logits", "log-probabilities"
# a difference against the values' size from which rounding no longer explains it
SUSPICIOUS = 1e-3
Taken = dict[tuple[str, str], list[Tensor]]
"""(row, column) of the table -> values of every sequence, [L, …]."""


@dataclass(frozen=True)
class Difference:
    """Of two values of the same place."""

    largest: float
    mean: float
    size: float
    """Largest absolute value of the first."""

    @property
    def is_suspicious(self) -> bool:
        return not self.largest <= SUSPICIOUS * max(self.size, 1e-6)


def watch(stack: ExitStack, module: torch.nn.Module, place: tuple[str, str], taken: Taken, batch_dim: int) -> None:
    """Keep what a module gives for a batch of one sequence."""

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        # a copy, because Megatron adds the residual in place
        kept = value.detach().to("cpu", torch.float32, copy=True)
        taken.setdefault(place, []).append(kept.squeeze(batch_dim))

    stack.enter_context(module.register_forward_hook(keep))


def finish(taken: Taken, logits: Tensor, tokens: Tensor) -> None:
    """Add logits [L, V] and the log-probabilities [L - 1] of the tokens that follow."""
    taken.setdefault((LOGITS, LAYER), []).append(logits)
    following = torch.log_softmax(logits[:-1], dim=-1).gather(1, tokens[1:, None])[:, 0]
    taken.setdefault((LOGPROBS, LAYER), []).append(following)


@torch.no_grad()
def run_transformers(folder: Path, sequences: list[Tensor]) -> Taken:
    """What the Hugging Face model gives."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    taken: Taken = {}
    with ExitStack() as stack:
        watch(stack, model.model.embed_tokens, (EMBEDDING, LAYER), taken, 0)
        watch(stack, model.model.norm, (FINAL_NORM, LAYER), taken, 0)
        for number, layer in enumerate(model.model.layers):
            modules = dict(layer.named_children())
            feed_forward = modules.get("mlp") or modules["block_sparse_moe"]  # Mixtral's, in transformers 4
            watch(stack, layer.self_attn, (f"layer {number}", ATTENTION), taken, 0)
            watch(stack, feed_forward, (f"layer {number}", FEED_FORWARD), taken, 0)
            watch(stack, layer, (f"layer {number}", LAYER), taken, 0)
        for tokens in sequences:
            finish(taken, model(tokens[None]).logits[0].float(), tokens)
    return taken


@torch.no_grad()
def run_megatron(folder: Path, config_folder: Path, sequences: list[Tensor]) -> Taken:
    """What Megatron-Core gives with the weights of a checkpoint."""
    from megatron_rl.config.data import DataSection, SourceSection
    from megatron_rl.config.schema import ModelSection, RunConfig, RunSection
    from megatron_rl.mcore.model.config import transformer_config
    from megatron_rl.mcore.model.gpt_model import build_chunks, check_weights, global_parameters, load_hf_weights
    from megatron_rl.mcore.model.precision import choose_implementation
    from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world

    config = RunConfig(
        run=RunSection(name="parity", output_dir="unused", num_steps=0),
        model=ModelSection(path=str(config_folder), dtype="fp32", implementation="local"),
        data=DataSection(train=SourceSection(kind="task", path="unused")),
    )
    parallel = init_parallel(config.parallel)
    try:
        spec = read_model_spec(config_folder)
        implementation = choose_implementation(config)
        (model,) = build_chunks(spec, transformer_config(spec, config, implementation), implementation, parallel)
        load_hf_weights(global_parameters([model], parallel), spec, parallel, check_weights(spec, str(folder)))
        model.eval()
        taken: Taken = {}
        with ExitStack() as stack:
            watch(stack, model.embedding, (EMBEDDING, LAYER), taken, 1)
            watch(stack, model.decoder.final_layernorm, (FINAL_NORM, LAYER), taken, 1)
            for number, layer in enumerate(model.decoder.layers):
                watch(stack, layer.self_attention, (f"layer {number}", ATTENTION), taken, 1)
                watch(stack, layer.mlp, (f"layer {number}", FEED_FORWARD), taken, 1)
                watch(stack, layer, (f"layer {number}", LAYER), taken, 1)
            for tokens in sequences:
                row = tokens[None].to(parallel.device)
                hidden = model(row, torch.arange(tokens.numel(), device=row.device)[None], None)
                logits = (hidden[0] @ model.output_weight().t())[:, : spec.vocab_size]
                finish(taken, logits.float().cpu(), tokens)
        return taken
    finally:
        leave_world()


def compare(first: Taken, second: Taken) -> dict[tuple[str, str], Difference]:
    """Differences of every place, in the order of computation."""
    found = {}
    for place, values in first.items():
        one, two = torch.cat(values).double(), torch.cat(second[place]).double()
        apart = (one - two.view_as(one)).abs()
        found[place] = Difference(float(apart.max()), float(apart.mean()), float(one.abs().max()))
    return found


def table(found: dict[tuple[str, str], Difference]) -> str:
    """One line for every layer; what rounding does not explain is marked with *."""
    lines = [f"{'':18}{'attention':>12}{'feed-forward':>14}{'output max':>13}{'output mean':>13}{'of size':>11}"]
    for row in dict.fromkeys(row for row, _ in found):
        cells = "".join(
            _cell(found.get((row, column)), width)
            for column, width in ((ATTENTION, 12), (FEED_FORWARD, 14), (LAYER, 13))
        )
        output = found[row, LAYER]
        lines.append(f"{row:18}{cells}{output.mean:>13.2e}{output.size:>11.3g}")
    return "\n".join(lines)


def _cell(difference: Difference | None, width: int) -> str:
    if difference is None:
        return " " * width
    return f"{difference.largest:.2e}{'*' if difference.is_suspicious else ' '}".rjust(width)


def verdict(found: dict[tuple[str, str], Difference], tolerance: float) -> tuple[bool, str]:
    """Whether they agree, and where they begin not to."""
    largest = found[LOGPROBS, LAYER].largest
    agree = largest <= tolerance
    text = f"log-probabilities differ by at most {largest:.2e}; allowed: {tolerance:.0e}"
    if agree:
        return True, f"{text}. The two agree."
    first = next((" ".join(place) for place, difference in found.items() if difference.is_suspicious), None)
    where = f" The first place that rounding does not explain: {first}." if first else ""
    return False, f"{text}. The two differ.{where}"


def choose_sequences(folder: Path, prompts: str | None, count: int, length: int) -> list[Tensor]:
    """Token ids [L] of the given prompts, or random ones.

    Raises:
        DataError: a prompt is too short or too long, or the file cannot be read.
    """
    spec = read_model_spec(folder)
    longest = spec.max_position_embeddings
    if prompts is None:
        if not 2 <= length <= longest:
            raise DataError(f"--length {length}: expected 2 to {longest}, the model's positions.")
        generator = torch.Generator().manual_seed(0)
        return list(torch.randint(0, spec.vocab_size, (count, length), generator=generator))
    from megatron_rl.data.templates import load_tokenizer

    try:
        lines = [line for line in Path(prompts).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(
            f"--prompts {prompts}: {error.strerror}. Give a text file with one prompt in a line."
        ) from error
    tokenizer = load_tokenizer(str(folder))
    rows = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    if not rows or not all(2 <= row.numel() <= longest for row in rows):
        sizes = [row.numel() for row in rows]
        raise DataError(f"--prompts {prompts}: prompts of {sizes} tokens, expected at least one, each 2 to {longest}.")
    return rows


def check_same_shape(first: Path, second: Path) -> None:
    """Two folders whose config.json describe models of one shape.

    Raises:
        ConversionError: they do not, so layers cannot be compared.
    """
    one, two = (hf_shapes(layout_table(read_model_spec(folder), 1)) for folder in (first, second))
    if one != two:
        odd = min(name for name in {**one, **two} if one.get(name) != two.get(name))
        raise ConversionError(
            f"{first} and {second} are models of different shapes: {odd} is {one.get(odd)} and {two.get(odd)}. "
            "Give the folder that the checkpoint was made from."
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare a Megatron checkpoint with a Hugging Face model.")
    parser.add_argument("--hf", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--megatron", required=True, type=Path, help="Megatron checkpoint")
    parser.add_argument("--prompts", help="text file with one prompt in a line (default: random tokens)")
    parser.add_argument("--num-sequences", type=int, default=4, help="of random tokens (default: 4)")
    parser.add_argument("--length", type=int, default=64, help="of a random sequence in tokens (default: 64)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of log-probabilities (default: 1e-3)")
    arguments = parser.parse_args()
    try:
        sequences = choose_sequences(arguments.hf, arguments.prompts, arguments.num_sequences, arguments.length)
        try:
            config_folder = find_model_folder(arguments.megatron)
        except ConversionError:
            config_folder = arguments.hf  # a checkpoint of Megatron-LM says too little of its architecture
        check_same_shape(arguments.hf, config_folder)
        theirs = run_transformers(arguments.hf, sequences)
        ours = run_megatron(arguments.megatron, config_folder, sequences)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = compare(theirs, ours)
    agree, text = verdict(found, arguments.tolerance)
    print(f"{sum(map(len, sequences))} tokens, {arguments.hf} against {arguments.megatron}, fp32, largest differences:")
    print(table(found))
    print(text)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
