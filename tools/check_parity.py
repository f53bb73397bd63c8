"""Compare a Megatron checkpoint with a Hugging Face model, layer by layer.

python tools/check_parity.py --hf HF_DIR --megatron DIR [--prompts FILE]

Both run in fp32 on this machine, one after the other, so memory for one model is enough. The exit status is 0 if no
log-probability differs by more than --tolerance, 1 if one does, and 2 if the comparison is impossible.
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
# largest difference, relative to the largest value, that rounding explains
SUSPICIOUS = 1e-3
Activations = dict[tuple[str, str], list[Tensor]]
"""(row, column) of the table -> one tensor per sequence, [L, …]."""


@dataclass(frozen=True)
class Difference:
    """How far one activation of the two models differs."""

    largest: float
    mean: float
    size: float
    """Largest absolute value in the first model."""

    @property
    def is_suspicious(self) -> bool:
        return not self.largest <= SUSPICIOUS * max(self.size, 1e-6)


def record_output(
    stack: ExitStack, module: torch.nn.Module, cell: tuple[str, str], activations: Activations, batch_dim: int
) -> None:
    """Record a module's outputs for batches of one sequence, until ``stack`` is closed.

    Args:
        cell: (row, column) of the table.
        batch_dim: dimension of size 1 that is removed.
    """

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        # a copy, because Megatron adds the residual in place
        kept = value.detach().to("cpu", torch.float32, copy=True)
        activations.setdefault(cell, []).append(kept.squeeze(batch_dim))

    stack.enter_context(module.register_forward_hook(keep))


def add_logits(activations: Activations, logits: Tensor, tokens: Tensor) -> None:
    """Add logits [L, V] and the log-probabilities [L - 1] of the next tokens."""
    activations.setdefault((LOGITS, LAYER), []).append(logits)
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, tokens[1:, None])[:, 0]
    activations.setdefault((LOGPROBS, LAYER), []).append(logprobs)


@torch.no_grad()
def run_transformers(folder: Path, sequences: list[Tensor]) -> Activations:
    """Activations of the Hugging Face model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    activations: Activations = {}
    with ExitStack() as stack:
        record_output(stack, model.model.embed_tokens, (EMBEDDING, LAYER), activations, 0)
        record_output(stack, model.model.norm, (FINAL_NORM, LAYER), activations, 0)
        for number, layer in enumerate(model.model.layers):
            modules = dict(layer.named_children())
            feed_forward = modules.get("mlp") or modules["block_sparse_moe"]  # Mixtral's, in transformers 4
            record_output(stack, layer.self_attn, (f"layer {number}", ATTENTION), activations, 0)
            record_output(stack, feed_forward, (f"layer {number}", FEED_FORWARD), activations, 0)
            record_output(stack, layer, (f"layer {number}", LAYER), activations, 0)
        for tokens in sequences:
            add_logits(activations, model(tokens[None]).logits[0].float(), tokens)
    return activations


@torch.no_grad()
def run_megatron(folder: Path, config_folder: Path, sequences: list[Tensor]) -> Activations:
    """Activations of Megatron-Core with the weights of a checkpoint."""
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
        activations: Activations = {}
        with ExitStack() as stack:
            record_output(stack, model.embedding, (EMBEDDING, LAYER), activations, 1)
            record_output(stack, model.decoder.final_layernorm, (FINAL_NORM, LAYER), activations, 1)
            for number, layer in enumerate(model.decoder.layers):
                record_output(stack, layer.self_attention, (f"layer {number}", ATTENTION), activations, 1)
                record_output(stack, layer.mlp, (f"layer {number}", FEED_FORWARD), activations, 1)
                record_output(stack, layer, (f"layer {number}", LAYER), activations, 1)
            for tokens in sequences:
                row = tokens[None].to(parallel.device)
                hidden = model(row, torch.arange(tokens.numel(), device=row.device)[None], None)
                logits = (hidden[0] @ model.output_weight().t())[:, : spec.vocab_size]
                add_logits(activations, logits.float().cpu(), tokens)
        return activations
    finally:
        leave_world()


def compare(first: Activations, second: Activations) -> dict[tuple[str, str], Difference]:
    """Difference of every activation, in the order of computation."""
    differences = {}
    for cell, values in first.items():
        one, two = torch.cat(values).double(), torch.cat(second[cell]).double()
        delta = (one - two.view_as(one)).abs()
        differences[cell] = Difference(float(delta.max()), float(delta.mean()), float(one.abs().max()))
    return differences


def table(differences: dict[tuple[str, str], Difference]) -> str:
    """One line per layer; * marks a difference that rounding does not explain."""
    lines = [f"{'':18}{'attention':>12}{'feed-forward':>14}{'output max':>13}{'output mean':>13}{'of size':>11}"]
    for row in dict.fromkeys(row for row, _ in differences):
        cells = "".join(
            _cell(differences.get((row, column)), width)
            for column, width in ((ATTENTION, 12), (FEED_FORWARD, 14), (LAYER, 13))
        )
        output = differences[row, LAYER]
        lines.append(f"{row:18}{cells}{output.mean:>13.2e}{output.size:>11.3g}")
    return "\n".join(lines)


def _cell(difference: Difference | None, width: int) -> str:
    if difference is None:
        return " " * width
    return f"{difference.largest:.2e}{'*' if difference.is_suspicious else ' '}".rjust(width)


def conclusion(differences: dict[tuple[str, str], Difference], tolerance: float) -> tuple[bool, str]:
    """Whether the two models agree, and a sentence that says so or names the first deviation."""
    largest = differences[LOGPROBS, LAYER].largest
    agree = largest <= tolerance
    text = f"log-probabilities differ by at most {largest:.2e}; allowed: {tolerance:.0e}"
    if agree:
        return True, f"{text}. The two agree."
    first = next((" ".join(cell) for cell, difference in differences.items() if difference.is_suspicious), None)
    where = f" The first difference that rounding does not explain is in: {first}." if first else ""
    return False, f"{text}. The two differ.{where}"


def choose_sequences(folder: Path, prompts: str | None, count: int, length: int) -> list[Tensor]:
    """Token ids [L] of the prompts in a file, or of random sequences.

    Raises:
        DataError: a prompt is too short or too long, or the file cannot be read.
    """
    spec = read_model_spec(folder)
    longest = spec.max_position_embeddings
    if prompts is None:
        if not 2 <= length <= longest:
            raise DataError(f"--length {length}: expected 2 to {longest}, the model's max_position_embeddings.")
        generator = torch.Generator().manual_seed(0)
        return list(torch.randint(0, spec.vocab_size, (count, length), generator=generator))
    from megatron_rl.data.templates import load_tokenizer

    try:
        lines = [line for line in Path(prompts).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"--prompts {prompts}: {error.strerror}. Give a text file with one prompt per line.") from error
    tokenizer = load_tokenizer(str(folder))
    rows = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    if not rows or not all(2 <= row.numel() <= longest for row in rows):
        sizes = [row.numel() for row in rows]
        raise DataError(
            f"--prompts {prompts}: the prompts have {sizes} tokens; expected at least one prompt, "
            f"each of 2 to {longest} tokens."
        )
    return rows


def check_same_shape(first: Path, second: Path) -> None:
    """Check that the config.json of both folders describe models of the same shapes.

    Raises:
        ConversionError: the shapes differ, so layers cannot be compared.
    """
    one, two = (hf_shapes(layout_table(read_model_spec(folder), 1)) for folder in (first, second))
    if one != two:
        odd = min(name for name in {**one, **two} if one.get(name) != two.get(name))
        raise ConversionError(
            f"{first} and {second} are models of different shapes: {odd} is {one.get(odd)} in the first and "
            f"{two.get(odd)} in the second. Give the folder that the checkpoint was made from."
        )


def main() -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Compare a Megatron checkpoint with a Hugging Face model.")
    parser.add_argument("--hf", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--megatron", required=True, type=Path, help="Megatron checkpoint")
    parser.add_argument("--prompts", help="text file with one prompt per line (default: random tokens)")
    parser.add_argument("--num-sequences", type=int, default=4, help="number of random sequences (default: 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a random sequence (default: 64)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="allowed difference of log-probabilities (default: 1e-3)"
    )
    args = parser.parse_args()
    try:
        sequences = choose_sequences(args.hf, args.prompts, args.num_sequences, args.length)
        try:
            config_folder = find_model_folder(args.megatron)
        except ConversionError:
            config_folder = args.hf  # a Megatron-LM checkpoint does not describe its architecture fully
        check_same_shape(args.hf, config_folder)
        reference = run_transformers(args.hf, sequences)
        converted = run_megatron(args.megatron, config_folder, sequences)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differences = compare(reference, converted)
    agree, text = conclusion(differences, args.tolerance)
    print(f"{sum(map(len, sequences))} tokens, {args.hf} against {args.megatron}, fp32, largest differences:")
    print(table(differences))
    print(text)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
