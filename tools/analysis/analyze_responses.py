"""Measure how responses behave: reflection, length, repetition.

    python tools/analysis/analyze_responses.py FOLDER [FOLDER …] --output DIR [--judge-model NAME …]

Each folder is a run (metrics.keep_rollouts_every=N; a column for each step), or the run.output_dir of an evaluation (a
column for each task, with template and temperature where the suite names some). Writes DIR/behaviour.json and
DIR/behaviour.html: right answers, pass@8, reflection by two pools of keywords and by a judge, tokens of right and wrong
responses, answering, cuts and repetition. A judge is a model behind an endpoint that speaks OpenAI's protocol, or, with
--judge-engine, a folder; what it says is kept in DIR/judged.jsonl and not asked again.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="How the responses of runs and evaluations behave.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="runs or evaluations")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--min-reward", type=float, default=1.0, help="reward of a right response of a run (1.0)")
    parser.add_argument(
        "--answer-shown-by", metavar="REGEX", help="its first group is a response's answer, of a run (default: a box)"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="name at the endpoint, or a folder")
    parser.add_argument("--judge-url", metavar="URL", help="of the endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--judge-engine", choices=("embedded", "vllm", "sglang"), help="that runs a judge's folder")
    parser.add_argument("--judge-dtype", choices=("bf16", "fp32"), default="bf16", help="of a judge's folder (bf16)")
    parser.add_argument(
        "--verdicts", nargs="+", choices=VERDICTS, default=list(VERDICTS), help="what a judge is asked (all)"
    )
    asked = parser.parse_args(arguments)
    if (asked.judge_model is None) != (asked.judge_url is None and asked.judge_engine is None):
        parser.error("a judge is --judge-model with --judge-url or --judge-engine")
    if asked.judge_url is not None and asked.judge_engine is not None:
        parser.error("--judge-url and --judge-engine exclude each other")
    try:
        from megatron_rl.analysis.responses import read_responses

        said = read_responses(asked.folders, min_reward=asked.min_reward, answer_shown_by=asked.answer_shown_by)
        if asked.judge_model is not None:
            said = judged(said, asked)
        found = by_label(said)
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "behaviour.json").write_text(json.dumps([asdict(one) for one in found], indent=2))
        title = "Behaviour of " + ", ".join(folder.name for folder in asked.folders)
        (asked.output / "behaviour.html").write_text(render_behaviour(title, found, said))
    except MegatronRLError as error:
        sys.exit(f"error: {error}")
    print(f"{len(said)} responses, page: {asked.output}/behaviour.html")
    return 0


def judged(said: Sequence[ResponseRecord], asked: argparse.Namespace) -> list[ResponseRecord]:
    """The responses with what the judge says of each."""
    from megatron_rl.analysis.llm_judge import LLMJudge
    from megatron_rl.config.evaluation import EvalConfig, EvalEngineSection, EvalRunSection
    from megatron_rl.config.parallel import ParallelSection
    from megatron_rl.config.schema import ModelSection
    from megatron_rl.data.templates import load_tokenizer
    from megatron_rl.evaluation.backend_setup import start_backend
    from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world
    from megatron_rl.weights.open import find_model_folder

    config = EvalConfig(
        run=EvalRunSection(name="judge", output_dir=str(asked.output)),
        model=ModelSection(path=asked.judge_model, dtype=asked.judge_dtype),
        tasks=["judge"],
        engine=EvalEngineSection(name=asked.judge_engine or "openai", url=asked.judge_url),
    )
    described = None if asked.judge_engine is None else str(find_model_folder(Path(asked.judge_model)))
    tokenizer = None if described is None else load_tokenizer(described)
    judge = LLMJudge(asked.output / "judged.jsonl", asked.judge_model)
    wanted = [judge.asked(said, VERDICTS[name], tokenizer) for name in asked.verdicts]
    found = list(said)
    try:
        parallel = init_parallel(ParallelSection())
        with closing(start_backend(config, described, wanted, tokenizer, parallel)) as answerer:
            for name, (task, questions) in zip(asked.verdicts, wanted, strict=True):
                judge.ask(task, questions, answerer, lambda text: print(text, flush=True))
                found = judge.judged(found, name, VERDICTS[name])
    finally:
        leave_world()
    return found


if __name__ == "__main__":
    sys.exit(main())
