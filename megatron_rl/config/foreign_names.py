"""Suggestions for unknown keys and values: renamed ones, names of other trainers, near misses."""

import difflib

# Former dotted key, or section, of this project -> its present name.
RENAMED_KEYS: dict[str, str] = {
    "algorithm.keep_most_spread": "algorithm.top_std_fraction",
    "batching.num_updates": "batching.num_mini_batches",
    "data.evaluation": "data.validation",
    "evaluation": "validation",
    "evaluation.suite": "benchmarks.suite",
    "evaluation.suite_every": "benchmarks.every",
    "memory.if_too_large": "memory.on_overcommit",
    "rollout.asynchronous": "rollout.async_rollout",
    "rollout.partial": "rollout.partial_rollout",
    "rollout.sleep": "rollout.sleep_engine",
    "run.stop_before_end_s": "run.stop_margin_s",
    "run.stuck_after_s": "run.hang_timeout_s",
}

# Dotted key -> former or foreign value (lower case, '_' for '-') -> our value, with other keys to set where the method
# needs them. The foreign values are verl's unless a comment names another trainer.
FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "algorithm.advantage": {
        "group": "grpo",  # former name
        "grpo_vectorized": "grpo",
        "group_norm": "grpo",  # OpenRLHF
        "dr_grpo": "grpo with algorithm.normalize_by_std=false and algorithm.aggregation=constant_length",  # OpenRLHF
        "gspo": "grpo with algorithm.loss=gspo",  # slime
        "ppo": "gae",  # slime
        "rloo_vectorized": "rloo",
        "reinforce_plus_plus": "reinforce with algorithm.whiten_advantages=true",
        "reinforce++": "reinforce with algorithm.whiten_advantages=true",
        "reinforce_plus_plus_baseline": (
            "grpo with algorithm.normalize_by_std=false and algorithm.whiten_advantages=true"
        ),
        "reinforce_baseline": (  # OpenRLHF
            "grpo with algorithm.normalize_by_std=false and algorithm.whiten_advantages=true"
        ),
        "remax": "reinforce with rollout.greedy_baseline=true",
        "on_policy_distillation": "distillation",  # slime
    },
    "algorithm.loss": {
        "clipped": "ppo_clip",  # former name
        "vanilla": "ppo_clip",
        "ppo": "ppo_clip",  # OpenRLHF
        "grpo": "ppo_clip",
        "policy_loss": "ppo_clip",  # slime
        "token": "ppo_clip",  # TRL's importance_sampling_level
        "sequence": "gspo",  # TRL's importance_sampling_level
        "gpg": "policy_gradient",
        "reinforce": "policy_gradient",
        "sft": "nll",
        "sft_loss": "nll",  # slime
    },
    "algorithm.aggregation": {
        "seq_mean_token_mean": "sequence_mean",
        "seq_mean_token_sum_norm": "constant_length",
        "bnpo": "token_mean",  # TRL's loss_type, as the three below
        "dapo": "token_mean",
        "grpo": "sequence_mean",
        "dr_grpo": "constant_length",
    },
    "algorithm.kl_estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "memory.on_overcommit": {"refuse": "error"},  # former name
}

# Last part of a foreign dotted key (lower case, '_' for '-') -> our key. From verl, slime, TRL and NeMo-RL.
FOREIGN_NAMES: dict[str, str] = {
    # verl
    "n": "rollout.group_size",
    "train_batch_size": "rollout.num_prompts_per_step",
    "ppo_mini_batch_size": "batching.num_mini_batches",
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
    "loss_mode": "algorithm.loss",
    "clip_ratio_c": "algorithm.clip_ratio_dual",
    "use_kl_in_reward": "algorithm.kl_reward_coef",
    "entropy_coeff": "algorithm.entropy_coef",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "train_files": "data.train.path",
    "val_files": "data.validation.path",
    "test_freq": "validation.every",
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
    "rollout_is_threshold": "algorithm.rollout_is_high",
    "rollout_is_threshold_lower": "algorithm.rollout_is_low",
    "rollout_is_level": "algorithm.rollout_is",
    "rollout_is_mode": "algorithm.rollout_is",
    "rollout_rs": "algorithm.rollout_rejection",
    "rollout_rs_threshold": "algorithm.rollout_rejection_high",
    "rollout_rs_threshold_lower": "algorithm.rollout_rejection_low",
    "rollout_token_veto_threshold": "algorithm.rollout_veto",
    "filter_groups": "rollout.dynamic_sampling",
    "max_num_gen_batches": "rollout.max_rounds",
    "max_assistant_turns": "rollout.max_turns",
    "rollout_data_dir": "metrics.keep_rollouts_every",
    "free_cache_engine": "rollout.sleep_engine",
    "tis_imp_ratio_cap": "algorithm.rollout_is_high",
    # slime
    "over_sampling_batch_size": "rollout.over_sampling",
    "partial_rollout": "rollout.partial_rollout",
    "n_samples_per_prompt": "rollout.group_size",
    "rollout_batch_size": "rollout.num_prompts_per_step",
    "global_batch_size": "batching.num_mini_batches",
    "num_rollout": "run.num_steps",
    "eps_clip": "algorithm.clip_ratio_low",
    "eps_clip_high": "algorithm.clip_ratio_high",
    "calculate_per_token_loss": "algorithm.aggregation",
    "disable_grpo_std_normalization": "algorithm.normalize_by_std",
    "advantage_estimator": "algorithm.advantage",
    "normalize_advantages": "algorithm.whiten_advantages",
    "eps_clip_c": "algorithm.clip_ratio_dual",
    "use_unbiased_kl": "algorithm.kl_unbiased",
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
    "use_tis": "algorithm.rollout_is",
    "tis_mode": "algorithm.rollout_is",
    "tis_level": "algorithm.rollout_is",
    "tis_clip": "algorithm.rollout_is_high",
    "tis_clip_low": "algorithm.rollout_is_low",
    "tis_upper_bound": "algorithm.rollout_is_high",
    "tis_lower_bound": "algorithm.rollout_is_low",
    "use_rs": "algorithm.rollout_rejection",
    "rs_level": "algorithm.rollout_rejection",
    "rs_upper_bound": "algorithm.rollout_rejection_high",
    "rs_lower_bound": "algorithm.rollout_rejection_low",
    "rs_veto_threshold": "algorithm.rollout_veto",
    "lam": "algorithm.gae_lambda",
    "cliprange_value": "critic.clip_value",
    "critic_warmup": "critic.warmup_steps",
    "target_kl": "algorithm.kl_reward_target",
    "horizon": "algorithm.kl_reward_horizon",
    "high_level_gamma": "algorithm.turn_gamma",
    "rollout_filter_ratio": "algorithm.top_std_fraction",
    # TRL
    "num_generations": "rollout.group_size",
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.clip_ratio_low",
    "epsilon_high": "algorithm.clip_ratio_high",
    "loss_type": "algorithm.aggregation",
    "delta": "algorithm.clip_ratio_dual",
    "importance_sampling_level": "algorithm.loss",
    "mask_truncated_completions": "algorithm.mask_truncated",
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
    "eval_steps": "validation.every",
    "save_total_limit": "checkpoint.keep_last",
    "vllm_importance_sampling_correction": "algorithm.rollout_is",
    "vllm_importance_sampling_mode": "algorithm.rollout_is",
    "vllm_importance_sampling_cap": "algorithm.rollout_is_high",
    # NeMo-RL
    "num_generations_per_prompt": "rollout.group_size",
    "num_prompts_per_step": "rollout.num_prompts_per_step",
    "train_global_batch_size": "batching.num_mini_batches",
    "train_micro_batch_size": "batching.micro_batch_size",
    "reference_policy_kl_penalty": "algorithm.kl_coef",
    "ratio_clip_min": "algorithm.clip_ratio_low",
    "ratio_clip_max": "algorithm.clip_ratio_high",
    "ratio_clip_c": "algorithm.clip_ratio_dual",
    "overlong_filtering": "algorithm.mask_truncated",
    "token_level_loss": "algorithm.aggregation",
    "normalize_rewards": "algorithm.normalize_by_std",
    "max_total_sequence_length": "rollout.max_new_tokens",
    "sequence_packing": "batching.packed",
    "model_name": "model.path",
    "max_num_steps": "run.num_steps",
    "use_importance_sampling_correction": "algorithm.rollout_is",
    "truncated_importance_sampling_type": "algorithm.rollout_is",
    "truncated_importance_sampling_ratio": "algorithm.rollout_is_high",
    "truncated_importance_sampling_ratio_min": "algorithm.rollout_is_low",
}


def suggest(key: str, known: list[str]) -> str | None:
    """Return the known dotted key that an unknown one most likely means, or None.

    Args:
        key: the unknown dotted key.
        known: all dotted keys of the configuration.
    """
    renamed = present_name(key)
    if renamed is not None:
        near = difflib.get_close_matches(renamed, known, n=1, cutoff=0.75)
        if near:
            return near[0]
    last = key.replace("-", "_").lower().rsplit(".", 1)[-1]
    same_last = [name for name in known if name.rsplit(".", 1)[-1] == last]
    if same_last:
        return min(same_last, key=_depth)
    if FOREIGN_NAMES.get(last) in known:
        return FOREIGN_NAMES[last]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    by_last = FOREIGN_NAMES | {name.rsplit(".", 1)[-1]: name for name in sorted(known, key=_depth, reverse=True)}
    near = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)
    return by_last[near[0]] if near else None


def suggest_value(key: str, value: object) -> str | None:
    """Return the value of a key that a former or foreign one means, with other keys to set, or None if there is none.

    Args:
        key: dotted key.
        value: the value that the key does not have.
    """
    return FOREIGN_VALUES.get(key, {}).get(str(value).replace("-", "_").lower())


def present_name(key: str) -> str | None:
    """Return the present name of a former key, or of a key in a former section; None for any other key."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):  # a key with a new name of its own before its section
        present = RENAMED_KEYS.get(".".join(parts[:count]))
        if present is not None:
            return ".".join([present, *parts[count:]])
    return None


def _depth(name: str) -> int:
    """Depth of a dotted key; shallow keys are preferred, because users mean them more often than nested ones."""
    return name.count(".")
