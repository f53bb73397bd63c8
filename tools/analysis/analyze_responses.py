"""Measure how responses behave: reflection, length, repetition.

    python tools/analysis/analyze_responses.py FOLDER [FOLDER …] --output DIR [--judge-model NAME …]

Each folder is a run (metrics.keep_rollouts_every=N; one column per step) or the run.output_dir of an evaluation (one
column per task, template and temperature). Writes DIR/behaviour.json and DIR/behaviour.html with accuracy, pass@8,
reflection by two pools of keywords and by an LLM judge, tokens of correct and wrong responses, and the shares of
responses that answer, are truncated or repeat themselves. The LLM judge is a model behind an OpenAI-compatible endpoint
or, with --judge-engine, a model folder; its outputs are kept in DIR/judged.jsonl and not requested again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from megatron_rl.analysis.behaviour import ResponseRecord, by_label
from megatron_rl.analysis.behaviour_page import render_behaviour
from megatron_rl.analysis.reflection import ANSWERING, REFLECTION
from megatron_rl.errors import MegatronRLError

VERDICTS = {"reflection": REFLECTION, "answering": ANSWERING}


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Measure how the responses of runs and evaluations behave.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="runs or evaluations")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--min-reward", type=float, default=1.0, help="least reward of a correct response of a run (1.0)"
    )
    parser.add_argument(
        "--answer-shown-by",
        metavar="REGEX",
        help="regular expression whose first group is the answer in a response of a run (default: \\boxed{})",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the LLM judge: name at the endpoint, or model folder")
    parser.add_argument("--judge-url", metavar="URL", help="endpoint of the judge, such as http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--judge-engine", choices=("embedded", "vllm", "sglang"), help="engine that runs the judge's folder"
    )
    parser.add_argument(
        "--judge-dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of the judge's folder (bf16)"
    )
    parser.add_argument(
        "--verdicts", nargs="+", choices=VERDICTS, default=list(VERDICTS), help="questions for the judge (all)"
    )
    args = parser.parse_args(argv)
    if (args.judge_model is None) != (args.judge_url is None and args.judge_engine is None):
        parser.error("an LLM judge needs --judge-model and either --judge-url or --judge-engine")
    if args.judge_url is not None and args.judge_engine is not None:
        parser.error("--judge-url and --judge-engine exclude each other")
    try:
        from megatron_rl.analysis.responses import read_responses

        responses = read_responses(args.folders, min_reward=args.min_reward, answer_shown_by=args.answer_shown_by)
        if args.judge_model is not None:
            responses = add_verdicts(responses, args)
        behaviours = by_label(responses)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "behaviour.json").write_text(json.dumps([asdict(one) for one in behaviours], indent=2))
        title = "Behaviour of " + ", ".join(folder.name for folder in args.folders)
        (args.output / "behaviour.html").write_text(render_behaviour(title, behaviours, responses))
    except MegatronRLError as error:
        sys.exit(f"error: {error}")
    print(f"{len(responses)} responses, page: {args.output}/behaviour.html")
    return 0


def add_verdicts(responses: Sequence[ResponseRecord], args: argparse.Namespace) -> list[ResponseRecord]:
    """The responses, each with the verdicts of the LLM judge."""
    from megatron_rl.analysis.llm_judge import LLMJudge
    from megatron_rl.config.evaluation import EvalConfig, EvalEngineSection, EvalRunSection
    from megatron_rl.config.parallel import ParallelSection
    from megatron_rl.config.schema import ModelSection
    from megatron_rl.data.templates import load_tokenizer
    from megatron_rl.evaluation.backend_setup import start_backend
    from megatron_rl.mcore.runtime.parallel import joined_world
    from megatron_rl.weights.open import find_model_folder

    config = EvalConfig(
        run=EvalRunSection(name="judge", output_dir=str(args.output)),
        model=ModelSection(path=args.judge_model, dtype=args.judge_dtype),
        tasks=["judge"],
        engine=EvalEngineSection(name=args.judge_engine or "openai", url=args.judge_url),
    )
    config_folder = None if args.judge_engine is None else str(find_model_folder(Path(args.judge_model)))
    tokenizer = None if config_folder is None else load_tokenizer(config_folder)
    judge = LLMJudge(args.output / "judged.jsonl", args.judge_model)
    requests = [judge.pending_questions(responses, VERDICTS[name], tokenizer) for name in args.verdicts]
    with_verdicts = list(responses)
    with (
        joined_world(ParallelSection()) as parallel,
        closing(start_backend(config, config_folder, requests, tokenizer, parallel)) as backend,
    ):
        for name, (task, questions) in zip(args.verdicts, requests, strict=True):
            judge.query(task, questions, backend, lambda text: print(text, flush=True))
            with_verdicts = judge.with_categories(with_verdicts, name, VERDICTS[name])
    return with_verdicts


if __name__ == "__main__":
    sys.exit(main())
