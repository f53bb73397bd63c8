"""Checks across configuration sections and against the world size; every error names the key to change."""

from megatron_rl.config.critic import CriticSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError


def validate(config: RunConfig, world_size: int) -> None:
    """Check that the sections of a configuration agree with each other and with the number of ranks.

    Raises:
        ConfigError: they do not; names the values, what was expected and the key to change.
    """
    check_parallel(config, world_size)
    if config.algorithm.uses_critic:
        _check_critic(config, world_size)
    elif config.critic != CriticSection():
        raise ConfigError(
            f"critic is set, but algorithm.advantage={config.algorithm.advantage} uses no critic. "
            "Set algorithm.advantage=gae, or remove the section critic."
        )
    _check_engine(config, world_size)
    limit = config.parallel.timeout_minutes * 60
    if config.run.hang_timeout_s is not None and config.run.hang_timeout_s >= limit:
        raise ConfigError(
            f"run.hang_timeout_s={config.run.hang_timeout_s:g}: collectives fail before that, after "
            f"parallel.timeout_minutes={config.parallel.timeout_minutes:g}. Set run.hang_timeout_s below {limit:g}, or "
            "raise parallel.timeout_minutes."
        )
    _check_routing_replay(config)
    _check_batches(config)
    _check_groups(config)
    _check_objective(config)
    if config.reward.model is not None:
        _check_reward_model(config)
    graded = config.validation.functions or config.reward.functions or config.rollout.environment
    if config.data.validation is not None and not graded:
        raise ConfigError("data.validation is set but nothing grades it. Set validation.functions or reward.functions.")
    if config.validation.every and config.data.validation is None:
        raise ConfigError(
            f"validation.every={config.validation.every} needs held-out prompts. "
            "Set data.validation, or validation.every=0."
        )


def _check_critic(config: RunConfig, world_size: int) -> None:
    try:
        check_parallel(config.for_critic(), world_size)
        _check_micro_batches(config.for_critic())
    except ConfigError as error:
        raise ConfigError(f"in the critic's configuration (critic.parallel, critic.optimizer): {error}") from error
    min_reward = config.algorithm.accept_min_reward
    if min_reward is not None:
        raise ConfigError(
            f"algorithm.accept_min_reward={min_reward} with algorithm.advantage={config.algorithm.advantage}: the "
            "critic would be trained on the accepted responses alone and overestimate values. Remove "
            "algorithm.accept_min_reward."
        )
    if config.rollout.source == "demonstrations":
        raise ConfigError(
            f"algorithm.advantage={config.algorithm.advantage} does not apply to demonstrations. Remove it."
        )


def _check_reward_model(config: RunConfig) -> None:
    """Reject settings that need the rewards before the reward model has scored, or that would make it score twice."""
    rollout = config.rollout
    for key, value, expected in (
        ("rollout.dynamic_sampling", rollout.dynamic_sampling, False),
        ("rollout.greedy_baseline", rollout.greedy_baseline, False),
        ("rollout.source", rollout.source, "engine"),
    ):
        if value != expected:
            raise ConfigError(
                f"{key}={value} with reward.model: expected {expected}. Change it, or remove reward.model."
            )
    advantage = config.algorithm.advantage
    if advantage in ("distillation", "pass_at_k"):
        raise ConfigError(
            f"algorithm.advantage={advantage} with reward.model: this estimator reads no rewards, or only whether they "
            "are at least 1. Choose another algorithm.advantage, or remove reward.model."
        )


def sequences_per_step(config: RunConfig) -> int:
    """Number of sequences that are trained on in one step."""
    group = config.rollout.group_size if config.rollout.source != "demonstrations" else 1
    return config.algorithm.num_kept(config.rollout.num_prompts_per_step) * group


def check_parallel(config: RunConfig, world_size: int) -> None:
    """Check the parallel layout against the world size and the load-balancing loss against the batch format.

    Raises:
        ConfigError: the layout does not divide the world size, or the loss needs padded batches.
    """
    parallel = config.parallel
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"world size {world_size} is not divisible by parallel.tensor_parallel_size={tp} x "
            f"parallel.pipeline_parallel_size={pp} x parallel.context_parallel_size={cp} = {tp * pp * cp}. "
            f"Start a multiple of {tp * pp * cp} ranks or change these keys."
        )
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_size
    if world_size % (ep * etp * pp):
        raise ConfigError(
            f"world size {world_size} is not divisible by parallel.expert_parallel_size={ep} x "
            f"parallel.expert_tensor_parallel_size={etp} x parallel.pipeline_parallel_size={pp} = {ep * etp * pp}. "
            f"Start a multiple of {ep * etp * pp} ranks or change these keys."
        )
    if config.moe.aux_loss == "sequence" and config.batching.packed:
        raise ConfigError(
            "moe.aux_loss=sequence balances every sequence separately, which Megatron-Core supports only for padded "
            "batches. Set batching.packed=false, or moe.aux_loss=micro_batch."
        )


def _check_engine(config: RunConfig, world_size: int) -> None:
    size = config.rollout.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} is not divisible by rollout.tensor_parallel_size={size}, the ranks of an engine. "
            f"Start a multiple of {size} ranks or change the key."
        )
    if config.rollout.async_rollout and config.memory.offload:
        raise ConfigError(
            "rollout.async_rollout=true generates rollouts while the policy is trained, so memory.offload cannot free "
            "the policy's memory for the engine. Set memory.offload=[]."
        )
    if config.rollout.async_rollout and config.rollout.sleep_engine:
        raise ConfigError(
            "rollout.async_rollout=true generates rollouts while the policy is trained, so the engine cannot sleep. "
            "Set rollout.sleep_engine=false."
        )
    if config.rollout.async_rollout and config.rollout.engine == "vllm" and size > 1:
        raise ConfigError(
            f"rollout.async_rollout=true with rollout.engine=vllm and rollout.tensor_parallel_size={size}: "
            "collectives of the engine and of the trainer would run in no fixed order and could deadlock. "
            "Set rollout.tensor_parallel_size=1, or rollout.engine=sglang, which runs in processes of its own."
        )
    if config.moe.routing_replay and config.rollout.engine != "embedded":
        raise ConfigError(
            f"moe.routing_replay=true: rollout.engine={config.rollout.engine} does not report its expert routing. "
            "Set moe.routing_replay=false, or rollout.engine=embedded."
        )


def _check_routing_replay(config: RunConfig) -> None:
    if not config.moe.routing_replay:
        return
    if config.rollout.source != "engine":
        raise ConfigError(
            f"moe.routing_replay=true: rollout.source={config.rollout.source} has no expert routing of an engine. "
            "Set moe.routing_replay=false."
        )
    recomputed = config.memory.recompute == "full" or (
        config.memory.recompute == "selective" and "moe" in config.memory.recompute_modules
    )
    if recomputed:
        raise ConfigError(
            f"moe.routing_replay=true with memory.recompute={config.memory.recompute}, which recomputes the experts: "
            "by then the recorded routing is that of other tokens. Set memory.recompute=selective without moe in "
            "memory.recompute_modules."
        )


def _check_batches(config: RunConfig) -> None:
    sequences, updates = sequences_per_step(config), config.batching.num_mini_batches
    if sequences % updates:
        raise ConfigError(
            f"{sequences} sequences per step (rollout.num_prompts_per_step x rollout.group_size, of which "
            "algorithm.top_std_fraction keeps a fraction) are not divisible by "
            f"batching.num_mini_batches={updates}. Change one of these."
        )
    advantage, group = config.algorithm.advantage, config.rollout.group_size
    if advantage in ("grpo", "rloo", "pass_at_k", "process") and config.algorithm.loss != "nll" and group < 2:
        raise ConfigError(
            f"rollout.group_size={group}: algorithm.advantage={advantage} compares samples of one prompt, at least 2. "
            "Set rollout.group_size=8, for instance."
        )
    if advantage == "pass_at_k" and config.algorithm.pass_k >= group:
        raise ConfigError(
            f"algorithm.pass_k={config.algorithm.pass_k} must be below rollout.group_size={group}, the number of "
            "samples of a prompt; otherwise all advantages are 0. Lower algorithm.pass_k or raise rollout.group_size."
        )
    for stage in config.data.curriculum:
        if stage.max_new_tokens is not None and stage.max_new_tokens > config.rollout.max_new_tokens:
            raise ConfigError(
                f"data.curriculum: max_new_tokens={stage.max_new_tokens} from step {stage.from_step} on is more than "
                f"rollout.max_new_tokens={config.rollout.max_new_tokens}, for which the engine is built. Raise "
                "rollout.max_new_tokens."
            )
    _check_micro_batches(config)
    horizon = config.algorithm.kl_reward_horizon
    if config.algorithm.kl_reward_target is not None and sequences > horizon:
        raise ConfigError(
            f"algorithm.kl_reward_horizon={horizon} is below the {sequences} responses of a step, so that one step "
            "could change algorithm.kl_reward_coef by more than 20 %. Raise algorithm.kl_reward_horizon to "
            f"{10 * sequences} or more."
        )


def _check_groups(config: RunConfig) -> None:
    """Check settings that compare, select or replace groups, and the curriculum, which selects prompts."""
    rollout, advantage = config.rollout, config.algorithm.advantage
    takes_baseline = advantage == "reinforce" or ":" in advantage
    if rollout.greedy_baseline and not (takes_baseline and rollout.source == "engine"):
        raise ConfigError(
            f"rollout.greedy_baseline=true with algorithm.advantage={advantage} and rollout.source={rollout.source}: "
            "expected reinforce, which has no other baseline, and engine. Set rollout.greedy_baseline=false."
        )
    if config.algorithm.top_std_fraction < 1 and (rollout.group_size < 2 or rollout.source == "demonstrations"):
        raise ConfigError(
            f"algorithm.top_std_fraction={config.algorithm.top_std_fraction} with rollout.group_size="
            f"{rollout.group_size} and rollout.source={rollout.source}: the reward std of a group of one is always 0. "
            "Set algorithm.top_std_fraction=1."
        )
    if config.algorithm.top_std_fraction < 1 and rollout.max_seconds_per_round is not None:
        raise ConfigError(
            f"algorithm.top_std_fraction={config.algorithm.top_std_fraction} with rollout.max_seconds_per_round="
            f"{rollout.max_seconds_per_round}: the number of groups of a step is not known in advance. Set only one of "
            "them."
        )
    if advantage == "distillation" and (rollout.dynamic_sampling or rollout.source == "demonstrations"):
        raise ConfigError(
            f"algorithm.advantage=distillation with rollout.dynamic_sampling={rollout.dynamic_sampling} and "
            f"rollout.source={rollout.source}: expected rollout.dynamic_sampling=false and rollouts of the policy. "
            "Change them."
        )
    if config.data.curriculum and rollout.source == "replay":
        raise ConfigError(
            "data.curriculum is set, but rollout.source=replay takes the prompts of the recorded run. Remove "
            "data.curriculum."
        )
    lengths = [stage.max_new_tokens or rollout.max_new_tokens for stage in config.data.curriculum]
    if rollout.partial_rollout and lengths != sorted(lengths):
        raise ConfigError(
            f"data.curriculum shortens responses (max_new_tokens {lengths}) with rollout.partial_rollout=true: "
            "carried-over responses could be longer than the new limit. Give later stages a larger max_new_tokens, or "
            "set rollout.partial_rollout=false."
        )
    if rollout.source == "demonstrations" and any(stage.max_new_tokens for stage in config.data.curriculum):
        raise ConfigError("data.curriculum max_new_tokens does not apply to demonstrations. Remove it.")


def _check_micro_batches(config: RunConfig) -> None:
    """Check that the longest sequence fits into a micro-batch, and the learning-rate schedule."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    ranks = config.parallel.context_parallel_size
    if config.batching.max_tokens_per_micro_batch * ranks < longest:
        shared = f" shared by {ranks} context-parallel ranks" if ranks > 1 else ""
        raise ConfigError(
            f"batching.max_tokens_per_micro_batch={config.batching.max_tokens_per_micro_batch} is below the longest "
            f"sequence, data.max_prompt_tokens + rollout.max_new_tokens = {longest}{shared}. "
            f"Raise it to at least {-(-longest // ranks)}."
        )
    check_decay(config.optimizer)


def check_decay(optimizer: OptimizerSection) -> None:
    """Check that the learning rate decays after its warm-up.

    Raises:
        ConfigError: the decay would end before the warm-up does.
    """
    decay, warmup = optimizer.lr_decay_updates, optimizer.lr_warmup_updates
    if decay is not None and decay <= warmup:
        raise ConfigError(
            f"optimizer.lr_decay_updates={decay} must be above optimizer.lr_warmup_updates={warmup}. "
            "Change one of them."
        )


def _check_objective(config: RunConfig) -> None:
    source, loss = config.rollout.source, config.algorithm.loss
    if source == "demonstrations" and loss != "nll":
        raise ConfigError(
            f"rollout.source=demonstrations needs algorithm.loss=nll, not {loss!r}. Set algorithm.loss=nll."
        )
    if source == "demonstrations" and config.data.train.demonstration_field is None:
        raise ConfigError("rollout.source=demonstrations needs data.train.demonstration_field: the column to imitate.")
    if (source == "replay") != (config.rollout.replay_path is not None):
        raise ConfigError(
            f"rollout.source={source} and rollout.replay_path={config.rollout.replay_path}: rollout.source=replay "
            "needs rollout.replay_path, and no other source uses it. Set both to replay a run, or neither."
        )
    graded = (
        config.reward.functions
        or config.reward.model
        or config.rollout.environment
        or config.algorithm.advantage == "distillation"
    )
    if source == "engine" and not graded:
        raise ConfigError(
            "reward.functions is empty and reward.model is null: rollouts need at least one reward. Set, for instance, "
            "reward.functions=[{name: math}]."
        )
    algorithm = config.algorithm
    corrected = [name for name in ("rollout_is", "rollout_rejection") if getattr(algorithm, name) != "none"]
    corrected += ["rollout_veto"] if algorithm.rollout_veto is not None else []
    if source == "demonstrations" and corrected:
        raise ConfigError(
            f"algorithm.{corrected[0]}={getattr(algorithm, corrected[0])} does not apply to demonstrations, "
            "which no engine sampled. Remove it."
        )
    if source != "demonstrations" and loss == "nll" and algorithm.accept_min_reward is None:
        raise ConfigError(
            "algorithm.loss=nll imitates all responses that the policy sampled, wrong ones as well. "
            "Set algorithm.accept_min_reward to the reward of a correct one."
        )
    for key, default in (("kl_coef", 0), ("mask_truncated", False), ("accept_min_reward", None)):
        value = getattr(algorithm, key)
        if source == "demonstrations" and value != default:
            raise ConfigError(f"algorithm.{key}={value} does not apply to demonstrations. Remove it.")
