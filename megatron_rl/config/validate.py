"""Checks across sections and against the world size, each naming the key to change."""

from megatron_rl.config.critic import CriticSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError


def validate(config: RunConfig, world_size: int) -> None:
    """Refuse a configuration whose sections contradict each other or the number of ranks.

    Raises:
        ConfigError: with the values, what was expected and the key to change.
    """
    check_parallel(config, world_size)
    if config.algorithm.uses_critic:
        _check_critic(config, world_size)
    elif config.critic != CriticSection():
        raise ConfigError(
            f"critic is set, but algorithm.advantage={config.algorithm.advantage} asks none. "
            "Set algorithm.advantage=gae, or leave critic out."
        )
    _check_engine(config, world_size)
    limit = config.parallel.timeout_minutes * 60
    if config.run.hang_timeout_s is not None and config.run.hang_timeout_s >= limit:
        raise ConfigError(
            f"run.hang_timeout_s={config.run.hang_timeout_s:g}: collectives fail after parallel.timeout_minutes="
            f"{config.parallel.timeout_minutes:g} already. Set it below {limit:g}, or raise the other."
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
        raise ConfigError(f"of the critic (critic.parallel, critic.optimizer): {error}") from error
    least = config.algorithm.accept_min_reward
    if least is not None:
        raise ConfigError(
            f"algorithm.accept_min_reward={least} with algorithm.advantage={config.algorithm.advantage}: the critic "
            "would learn from the good responses alone and expect too much. Leave it out."
        )
    if config.rollout.source == "demonstrations":
        raise ConfigError(
            f"algorithm.advantage={config.algorithm.advantage} has no meaning for demonstrations. Leave it out."
        )


def _check_reward_model(config: RunConfig) -> None:
    """What asks for rewards before the model has given its own, or would have it give them twice."""
    rollout = config.rollout
    for key, value, nothing in (
        ("rollout.dynamic_sampling", rollout.dynamic_sampling, False),
        ("rollout.greedy_baseline", rollout.greedy_baseline, False),
        ("rollout.source", rollout.source, "engine"),
    ):
        if value != nothing:
            raise ConfigError(
                f"{key}={value} with reward.model: expected {nothing}. Change it, or leave the model out."
            )
    advantage = config.algorithm.advantage
    if advantage in ("distillation", "pass_at_k"):
        raise ConfigError(
            f"algorithm.advantage={advantage} with reward.model: it reads no rewards, or only whether they are 1. "
            "Choose another one, or leave the model out."
        )


def sequences_per_step(config: RunConfig) -> int:
    """Training sequences that one step learns from."""
    group = config.rollout.group_size if config.rollout.source != "demonstrations" else 1
    return config.algorithm.num_kept(config.rollout.num_prompts_per_step) * group


def check_parallel(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"world size {world_size} does not divide by parallel.tensor_parallel_size={tp} x "
            f"parallel.pipeline_parallel_size={pp} x parallel.context_parallel_size={cp} = {tp * pp * cp}. "
            f"Start a multiple of {tp * pp * cp} ranks or change these keys."
        )
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_size
    if world_size % (ep * etp * pp):
        raise ConfigError(
            f"world size {world_size} does not divide by parallel.expert_parallel_size={ep} x "
            f"parallel.expert_tensor_parallel_size={etp} x parallel.pipeline_parallel_size={pp} = {ep * etp * pp}. "
            f"Start a multiple of {ep * etp * pp} ranks or change these keys."
        )
    if config.moe.aux_loss == "sequence" and config.batching.packed:
        raise ConfigError(
            "moe.aux_loss=sequence balances each sequence of its own, which Megatron-Core can only tell apart when "
            "padded. Set batching.packed=false, or moe.aux_loss=micro_batch."
        )


def _check_engine(config: RunConfig, world_size: int) -> None:
    size = config.rollout.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} does not divide by rollout.tensor_parallel_size={size}, the ranks of an engine. "
            f"Start a multiple of {size} ranks or change the key."
        )
    if config.rollout.async_rollout and config.memory.offload:
        raise ConfigError(
            "rollout.async_rollout=true samples while the policy learns, so memory.offload cannot lend "
            "the policy's memory to the engine. Set memory.offload=[]."
        )
    if config.rollout.async_rollout and config.rollout.sleep_engine:
        raise ConfigError(
            "rollout.async_rollout=true samples while the policy learns, so the engine cannot sleep. "
            "Set rollout.sleep_engine=false."
        )
    if config.rollout.async_rollout and config.rollout.engine == "vllm" and size > 1:
        raise ConfigError(
            f"rollout.async_rollout=true with rollout.engine=vllm and rollout.tensor_parallel_size={size}: "
            "collectives of the engine and of the training would meet in any order and could wait for each other. "
            "Set rollout.tensor_parallel_size=1, or rollout.engine=sglang, which has processes of its own."
        )
    if config.moe.routing_replay and config.rollout.engine != "embedded":
        raise ConfigError(
            f"moe.routing_replay=true: rollout.engine={config.rollout.engine} does not report its routes. "
            "Set it to false, or rollout.engine=embedded."
        )


def _check_routing_replay(config: RunConfig) -> None:
    if not config.moe.routing_replay:
        return
    if config.rollout.source != "engine":
        raise ConfigError("moe.routing_replay=true: demonstrations were routed by no engine. Set it to false.")
    recomputed = config.memory.recompute == "full" or (
        config.memory.recompute == "selective" and "moe" in config.memory.recompute_modules
    )
    if recomputed:
        raise ConfigError(
            f"moe.routing_replay=true with memory.recompute={config.memory.recompute} of the experts: by the time they "
            "are computed again, other tokens' routes are in place. Leave moe out of memory.recompute_modules."
        )


def _check_batches(config: RunConfig) -> None:
    sequences, updates = sequences_per_step(config), config.batching.num_mini_batches
    if sequences % updates:
        raise ConfigError(
            f"{sequences} sequences in a step (rollout.num_prompts_per_step x rollout.group_size, and what "
            "algorithm.top_std_fraction leaves of them) do not divide by "
            f"batching.num_mini_batches={updates}. Change one of these."
        )
    advantage, group = config.algorithm.advantage, config.rollout.group_size
    if advantage in ("grpo", "rloo", "pass_at_k", "process") and config.algorithm.loss != "nll" and group < 2:
        raise ConfigError(
            f"rollout.group_size={group}: algorithm.advantage={advantage} compares samples of one prompt, at least 2. "
            "Set rollout.group_size to 8 or so."
        )
    if advantage == "pass_at_k" and config.algorithm.pass_k >= group:
        raise ConfigError(
            f"algorithm.pass_k={config.algorithm.pass_k} must be below rollout.group_size={group}, the samples of a "
            "prompt: with no more of them than that, all have the same advantage. Lower one or raise the other."
        )
    for stage in config.data.curriculum:
        if stage.max_new_tokens is not None and stage.max_new_tokens > config.rollout.max_new_tokens:
            raise ConfigError(
                f"data.curriculum: max_new_tokens={stage.max_new_tokens} from step {stage.from_step} on is more than "
                f"rollout.max_new_tokens={config.rollout.max_new_tokens}, for which the engine is built. Raise that."
            )
    _check_micro_batches(config)
    horizon = config.algorithm.kl_reward_horizon
    if config.algorithm.kl_reward_target is not None and sequences > horizon:
        raise ConfigError(
            f"algorithm.kl_reward_horizon={horizon} is below the {sequences} responses of a step, so that a step could "
            "change the weight of the penalty by more than 20 %. Raise it to ten times as many or more."
        )


def _check_groups(config: RunConfig) -> None:
    """What compares groups, or says which of them there are."""
    rollout, advantage = config.rollout, config.algorithm.advantage
    compares = advantage == "reinforce" or ":" in advantage
    if rollout.greedy_baseline and not (compares and rollout.source == "engine"):
        raise ConfigError(
            f"rollout.greedy_baseline=true with algorithm.advantage={advantage} and rollout.source={rollout.source}: "
            "expected reinforce and engine, which have no other baseline. Set it to false."
        )
    if config.algorithm.top_std_fraction < 1 and (rollout.group_size < 2 or rollout.source == "demonstrations"):
        raise ConfigError(
            f"algorithm.top_std_fraction={config.algorithm.top_std_fraction} with rollout.group_size="
            f"{rollout.group_size} and rollout.source={rollout.source}: groups of one have no spread. Set it to 1."
        )
    if config.algorithm.top_std_fraction < 1 and rollout.max_seconds_per_round is not None:
        raise ConfigError(
            f"algorithm.top_std_fraction={config.algorithm.top_std_fraction} with rollout.max_seconds_per_round="
            f"{rollout.max_seconds_per_round}: how many groups a step has is not known before. Set one of them only."
        )
    if advantage == "distillation" and (rollout.dynamic_sampling or rollout.source == "demonstrations"):
        raise ConfigError(
            f"algorithm.advantage=distillation with rollout.dynamic_sampling={rollout.dynamic_sampling} and "
            f"rollout.source={rollout.source}: expected false, and samples of the policy. Change them."
        )
    if config.data.curriculum and rollout.source == "replay":
        raise ConfigError("data.curriculum is set, but rollout.source=replay takes the prompts of the recorded run.")
    lengths = [stage.max_new_tokens or rollout.max_new_tokens for stage in config.data.curriculum]
    if rollout.partial_rollout and lengths != sorted(lengths):
        raise ConfigError(
            f"data.curriculum shortens responses ({lengths}) with rollout.partial_rollout=true: "
            "carried-over samples could be too long already. Let stages grow, or set rollout.partial_rollout=false."
        )
    if rollout.source == "demonstrations" and any(stage.max_new_tokens for stage in config.data.curriculum):
        raise ConfigError("data.curriculum max_new_tokens has no meaning for demonstrations. Leave it out.")


def _check_micro_batches(config: RunConfig) -> None:
    """Of one model's layout and optimizer."""
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
    """
    Raises:
        ConfigError: the learning rate would have decayed before it has risen.
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
            f"rollout.source=demonstrations learns by algorithm.loss=nll, not {loss!r}. Set algorithm.loss=nll."
        )
    if source == "demonstrations" and config.data.train.demonstration_field is None:
        raise ConfigError("rollout.source=demonstrations needs data.train.demonstration_field: the column to imitate.")
    if (source == "replay") != (config.rollout.replay_path is not None):
        raise ConfigError(
            f"rollout.source={source} and rollout.replay_path={config.rollout.replay_path}: they belong together. "
            "Set both to replay a run, or neither."
        )
    graded = (
        config.reward.functions
        or config.reward.model
        or config.rollout.environment
        or config.algorithm.advantage == "distillation"
    )
    if source == "engine" and not graded:
        raise ConfigError(
            "reward.functions is empty and there is no reward.model: rollouts need at least one reward, for instance "
            "reward.functions=[{name: math}]."
        )
    algorithm = config.algorithm
    corrected = [name for name in ("rollout_is", "rollout_rejection") if getattr(algorithm, name) != "none"]
    corrected += ["rollout_veto"] if algorithm.rollout_veto is not None else []
    if source == "demonstrations" and corrected:
        raise ConfigError(
            f"algorithm.{corrected[0]}={getattr(algorithm, corrected[0])} has no meaning for demonstrations, "
            "which no engine sampled. Leave it out."
        )
    if source != "demonstrations" and loss == "nll" and algorithm.accept_min_reward is None:
        raise ConfigError(
            "algorithm.loss=nll imitates what the policy sampled, wrong answers as well. "
            "Set algorithm.accept_min_reward to the reward of a right one."
        )
    for key, nothing in (("kl_coef", 0), ("mask_truncated", False), ("accept_min_reward", None)):
        value = getattr(algorithm, key)
        if source == "demonstrations" and value != nothing:
            raise ConfigError(f"algorithm.{key}={value} has no meaning for demonstrations. Leave it out.")
