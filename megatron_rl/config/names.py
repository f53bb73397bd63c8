"""Suggestions for unknown keys: near misses, and the names other trainers use."""

import difflib

# Last part of a foreign key (lower case, '_' for '-') -> our key. From verl, slime, TRL and NeMo-RL.
FOREIGN_NAMES: dict[str, str] = {
    # verl
    "n": "rollout.group_size",
    "train_batch_size": "rollout.num_prompts_per_step",
    "ppo_mini_batch_size": "batching.num_updates",
    "ppo_micro_batch_size_per_gpu": "batching.micro_batch_size",
    "ppo_epochs": "batching.num_epochs",
    "ppo_max_token_len_per_gpu": "batching.max_tokens_per_micro_batch",
    "max_token_len": "batching.max_tokens_per_micro_batch",
    "use_dynamic_bsz": "batching.packed",
    "kl_loss_coef": "algorithm.kl_coef",
    "kl_loss_type": "algorithm.kl_estimator",
    "clip_ratio": "algorithm.clip_ratio_low",
    "loss_agg_mode": "algorithm.aggregation",
    "norm_adv_by_std_in_grpo": "algorithm.normalize_by_std",
    "adv_estimator": "algorithm.advantage",
    "entropy_coeff": "algorithm.entropy_coef",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "train_files": "data.train.path",
    "val_files": "data.evaluation.path",
    "test_freq": "evaluation.every",
    "save_freq": "checkpoint.every",
    "total_training_steps": "run.num_steps",
    "default_local_dir": "run.output_dir",
    "experiment_name": "run.name",
    "project_name": "metrics.wandb_project",
    "tensor_model_parallel_size": "parallel.tensor_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_parallel_size",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_parallel_size",
    "expert_model_parallel_size": "parallel.expert_parallel_size",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "recompute_granularity": "memory.recompute",
    "enable_gradient_checkpointing": "memory.recompute",
    "param_offload": "memory.offload",
    "grad_offload": "memory.offload",
    "optimizer_offload": "memory.offload",
    "optimizer_offload_fraction": "optimizer.cpu_offload_fraction",
    "enable_routing_replay": "moe.routing_replay",
    "max_num_seqs": "rollout.max_num_sequences",
    # slime
    "n_samples_per_prompt": "rollout.group_size",
    "rollout_batch_size": "rollout.num_prompts_per_step",
    "global_batch_size": "batching.num_updates",
    "num_rollout": "run.num_steps",
    "eps_clip": "algorithm.clip_ratio_low",
    "eps_clip_high": "algorithm.clip_ratio_high",
    "calculate_per_token_loss": "algorithm.aggregation",
    "disable_grpo_std_normalization": "algorithm.normalize_by_std",
    "use_dynamic_batch_size": "batching.packed",
    "max_tokens_per_gpu": "batching.max_tokens_per_micro_batch",
    "rollout_max_response_len": "rollout.max_new_tokens",
    "hf_checkpoint": "model.path",
    "fp8_recipe": "precision.fp8",
    "fp8_param_gather": "precision.fp8_params",
    "async_save": "checkpoint.in_background",
    "log_probs_chunk_size": "batching.logprob_chunk_tokens",
    "use_routing_replay": "moe.routing_replay",
    "moe_aux_loss_coeff": "moe.aux_loss_coef",
    # TRL
    "num_generations": "rollout.group_size",
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.clip_ratio_low",
    "epsilon_high": "algorithm.clip_ratio_high",
    "loss_type": "algorithm.aggregation",
    "scale_rewards": "algorithm.normalize_by_std",
    "max_completion_length": "rollout.max_new_tokens",
    "model_name_or_path": "model.path",
    "gradient_checkpointing": "memory.recompute",
    "learning_rate": "optimizer.lr",
    "warmup_steps": "optimizer.lr_warmup_updates",
    "max_grad_norm": "optimizer.clip_grad",
    "max_steps": "run.num_steps",
    "per_device_train_batch_size": "batching.micro_batch_size",
    "num_iterations": "batching.num_epochs",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluation.every",
    "save_total_limit": "checkpoint.keep_last",
    # NeMo-RL
    "num_generations_per_prompt": "rollout.group_size",
    "num_prompts_per_step": "rollout.num_prompts_per_step",
    "train_global_batch_size": "batching.num_updates",
    "train_micro_batch_size": "batching.micro_batch_size",
    "reference_policy_kl_penalty": "algorithm.kl_coef",
    "ratio_clip_min": "algorithm.clip_ratio_low",
    "ratio_clip_max": "algorithm.clip_ratio_high",
    "token_level_loss": "algorithm.aggregation",
    "normalize_rewards": "algorithm.normalize_by_std",
    "max_total_sequence_length": "rollout.max_new_tokens",
    "sequence_packing": "batching.packed",
    "model_name": "model.path",
    "max_num_steps": "run.num_steps",
}


def suggest(key: str, known: list[str]) -> str | None:
    """The known dotted key that ``key`` most likely means, or None."""
    last = key.replace("-", "_").lower().rsplit(".", 1)[-1]
    same_last = [name for name in known if name.rsplit(".", 1)[-1] == last]
    if same_last:
        return same_last[0]
    if last in FOREIGN_NAMES:
        return FOREIGN_NAMES[last]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    by_last = FOREIGN_NAMES | {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)
    return by_last[near[0]] if near else None
