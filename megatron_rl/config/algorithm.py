"""Configuration of advantages, policy loss, KL regularisation and rollout correction."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class AlgorithmSection:
    """Advantage estimator, policy loss, KL regularisation and rollout correction."""

    advantage: str = "grpo"
    """Advantage estimator (verl's adv_estimator). grpo: reward minus the mean of its group; rloo: reward minus the mean
    of the other samples of its group; reinforce: the reward; pass_at_k: contribution to the probability that one of
    pass_k samples is correct; process: rewards of reasoning steps, normalised over the steps of the group and summed
    from each token on; distillation: log-probability of each token under the teacher (reference_path) minus the
    policy's; or package.module:symbol. With a critic (PPO): gae: GAE over tokens; turn_gae: GAE over the turns of a
    conversation; bi_level_gae: GAE over turns, then over the tokens of each turn."""
    gamma: float = 1.0
    """Discount factor per token; for advantage=gae and bi_level_gae."""
    gae_lambda: float = 1.0
    """GAE lambda per token (verl's lam); for advantage=gae and bi_level_gae."""
    turn_gamma: float = 1.0
    """Discount factor per turn of a conversation (RAGEN's high_level_gamma); for advantage=turn_gae and
    bi_level_gae."""
    turn_gae_lambda: float = 1.0
    """GAE lambda per turn of a conversation; for advantage=turn_gae and bi_level_gae."""
    normalize_by_std: bool = True
    """Divide the advantages of advantage=grpo and process by the standard deviation of their group (verl's
    norm_adv_by_std_in_grpo, TRL's scale_rewards); false in Dr. GRPO."""
    std_epsilon: float = 1e-4
    """Epsilon added to the standard deviation by which normalize_by_std divides."""
    pass_k: int = 4
    """k of advantage=pass_at_k, in samples; a sample counts as correct if its total reward is 1 or more."""
    whiten_advantages: bool = False
    """Normalise the advantages of all tokens of a step to mean 0 and variance 1 (REINFORCE++; slime's
    normalize_advantages)."""
    kl_reward_coef: float = 0.0
    """Coefficient of the KL penalty in the reward: the k1 estimate of the KL divergence to the reference model is
    subtracted from every token's reward (verl's use_kl_in_reward); 0: no penalty."""
    kl_reward_target: float | None = None
    """Target of the adaptive KL controller: KL divergence per response, in nats, towards which kl_reward_coef is
    adapted after every step (verl's target_kl); null: kl_reward_coef is constant."""
    kl_reward_horizon: int = 10_000
    """Horizon of the adaptive KL controller, in responses: after this many, a KL divergence of 1.2 times
    kl_reward_target or more has raised kl_reward_coef by 20 % (verl's horizon)."""
    mask_truncated: bool = False
    """Exclude truncated responses from the loss: those cut at rollout.max_new_tokens, at the maximum sequence length or
    at the last turn of a conversation (overlong filtering; TRL's mask_truncated_completions). Their rewards still count
    in the statistics of their group."""
    top_std_fraction: float = 1.0
    """Fraction of a step's groups to train on: those with the highest reward standard deviation (RAGEN's
    rollout_filter_ratio; 0.25 in StarPO-S); 1: all groups."""
    accept_min_reward: float | None = None
    """Train only on responses with at least this total reward (rejection sampling, with loss=nll); null: train on
    all."""
    accept_max_per_prompt: int | None = None
    """Largest number of responses to one prompt that accept_min_reward accepts, the highest rewards first; null: no
    limit."""
    accept_unique: bool = True
    """With accept_min_reward: of several accepted responses to a prompt with the same text, train on one only."""
    loss: str = "ppo_clip"
    """Policy loss (verl's loss_mode). ppo_clip: clipped surrogate of PPO and GRPO; gspo: clipped surrogate with
    sequence-level ratios; cispo: clipped importance weights, with gradients for all tokens; policy_gradient: REINFORCE,
    no ratio; nll: supervised fine-tuning; or package.module:symbol."""
    clip_ratio_low: float = 0.2
    """Lower clip range: the ratio of current to old probability is clipped at 1 - clip_ratio_low (verl's clip_ratio,
    TRL's epsilon)."""
    clip_ratio_high: float = 0.2
    """Upper clip range: the ratio of current to old probability is clipped at 1 + clip_ratio_high (TRL's epsilon_high;
    0.28 in DAPO)."""
    clip_ratio_dual: float | None = None
    """Dual clip: upper bound of the ratio where the advantage is negative (verl's clip_ratio_c, TRL's delta); null: no
    bound."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """How token losses are averaged (verl's loss_agg_mode). token_mean: over all tokens of an update (DAPO);
    sequence_mean: over the tokens of each sequence, then over sequences (GRPO paper); constant_length: sum over each
    sequence divided by constant_length, then the mean over sequences (Dr. GRPO)."""
    constant_length: int | None = None
    """Divisor of aggregation=constant_length, in tokens; null: rollout.max_new_tokens."""
    kl_coef: float = 0.0
    """Coefficient of the KL loss to the reference model (verl's kl_loss_coef, TRL's beta); 0: no KL loss. The reference
    model is built only if kl_coef or kl_reward_coef is above 0, or with advantage=distillation."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL loss, as named by Schulman (verl's kl_loss_type). k1: unbiased, high variance; k2: biased,
    low variance; k3: unbiased, low variance."""
    kl_unbiased: bool = False
    """Multiply the KL loss by the ratio of current to old probability, so that its gradient is that of the KL
    divergence (slime's use_unbiased_kl)."""
    reference_path: str | None = None
    """Hugging Face folder of the reference model, or of the teacher with advantage=distillation; null: the policy as it
    is at the start of the run."""
    reference_reset_every: int = 0
    """Interval in steps at which the current policy becomes the new reference model; 0: never."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus in the loss (verl's entropy_coeff); 0: none."""
    rollout_is: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Rollout correction: importance weight of the policy loss, the ratio of trainer to engine probability. token_*:
    ratio of each token; sequence_*: ratio of the whole response; *_truncate: capped at rollout_is_high (TIS); *_mask: 0
    outside rollout_is_low to rollout_is_high (IcePop); none: no weight (verl's rollout_is, slime's use_tis)."""
    rollout_is_low: float = 0.5
    """Smallest importance ratio that rollout_is=token_mask and sequence_mask keep; smaller ones get weight 0 (verl's
    rollout_is_threshold_lower)."""
    rollout_is_high: float = 2.0
    """Largest importance ratio of rollout_is: the *_truncate choices cap larger ones, the *_mask choices give them
    weight 0 (verl's rollout_is_threshold, slime's tis_clip)."""
    rollout_rejection: Literal["none", "sequence", "geometric"] = "none"
    """Reject responses, that is, leave them out of the loss, by the ratio of trainer to engine probability (verl's
    rollout_rs). sequence: product of the token ratios; geometric: their geometric mean; none: no rejection. Tokens of
    rejected responses still count in the normalisation of the loss."""
    rollout_rejection_low: float | None = None
    """Smallest ratio that rollout_rejection accepts; required with it. Usual: 0.5 for sequence, 0.999 for geometric
    (verl's rollout_rs_threshold_lower)."""
    rollout_rejection_high: float | None = None
    """Largest ratio that rollout_rejection accepts; required with it. Usual: 2 for sequence, 1.001 for geometric
    (verl's rollout_rs_threshold)."""
    rollout_veto: float | None = None
    """Reject a response if the ratio of trainer to engine probability of any of its tokens is below this, for instance
    1e-4 (verl's rollout_token_veto_threshold); null: never."""

    def __post_init__(self) -> None:
        require(
            0 <= self.rollout_is_low <= 1 <= self.rollout_is_high,
            "algorithm.rollout_is_low and algorithm.rollout_is_high",
            (self.rollout_is_low, self.rollout_is_high),
            "low from 0 to 1, high 1 or more",
        )
        low, high = self.rollout_rejection_low, self.rollout_rejection_high
        require(
            (low is not None and high is not None) or self.rollout_rejection == "none",
            "algorithm.rollout_rejection_low and algorithm.rollout_rejection_high",
            (low, high),
            f"both bounds with algorithm.rollout_rejection={self.rollout_rejection}",
            "Usual bounds are 0.5 and 2 for sequence, 0.999 and 1.001 for geometric.",
        )
        require(
            (low is None or 0 <= low <= 1) and (high is None or high >= 1),
            "algorithm.rollout_rejection_low and algorithm.rollout_rejection_high",
            (low, high),
            "low from 0 to 1, high 1 or more",
        )
        veto = self.rollout_veto
        require(veto is None or 0 < veto < 1, "algorithm.rollout_veto", veto, "null, or between 0 and 1")
        require(0 <= self.clip_ratio_low <= 1, "algorithm.clip_ratio_low", self.clip_ratio_low, "0 to 1")
        require(self.clip_ratio_high >= 0, "algorithm.clip_ratio_high", self.clip_ratio_high, "0 or more")
        require(self.std_epsilon > 0, "algorithm.std_epsilon", self.std_epsilon, "more than 0")
        dual = self.clip_ratio_dual
        highest = 1 + self.clip_ratio_high
        require(
            dual is None or dual > highest,
            "algorithm.clip_ratio_dual",
            dual,
            f"null, or more than 1 + algorithm.clip_ratio_high = {highest:g}",
        )
        require(self.kl_coef >= 0, "algorithm.kl_coef", self.kl_coef, "0 or more")
        require(self.kl_reward_coef >= 0, "algorithm.kl_reward_coef", self.kl_reward_coef, "0 or more")
        ignored = {"cispo": ["clip_ratio_dual"], "policy_gradient": ["clip_ratio_dual"]}
        ignored["nll"] = ["clip_ratio_dual", "whiten_advantages", "kl_reward_coef"]
        for key in ignored.get(self.loss, ()):
            value = getattr(self, key)
            require(not value, f"algorithm.{key}", value, f"its default, because algorithm.loss={self.loss} ignores it")
        require(
            self.accept_max_per_prompt is None or self.accept_min_reward is not None,
            "algorithm.accept_max_per_prompt",
            self.accept_max_per_prompt,
            "null without algorithm.accept_min_reward",
            "Set algorithm.accept_min_reward to the lowest reward to train on.",
        )
        require(
            not self.kl_unbiased or self.kl_coef > 0, "algorithm.kl_unbiased", self.kl_unbiased, "false with kl_coef=0"
        )
        every = self.reference_reset_every
        require(every >= 0, "algorithm.reference_reset_every", every, "0 (never) or more")
        require(
            every == 0 or self.uses_reference,
            "algorithm.reference_reset_every",
            every,
            "0 without a reference model",
            "Set algorithm.kl_coef or algorithm.kl_reward_coef.",
        )
        for key in ("gamma", "gae_lambda", "turn_gamma", "turn_gae_lambda"):
            require(0 < getattr(self, key) <= 1, f"algorithm.{key}", getattr(self, key), "above 0 and at most 1")
        require(
            self.advantage != "distillation" or self.reference_path is not None,
            "algorithm.reference_path",
            self.reference_path,
            "the folder of the teacher with algorithm.advantage=distillation",
        )
        if self.advantage == "distillation":
            for key, default in (
                ("reference_reset_every", 0),
                ("kl_reward_coef", 0),
                ("top_std_fraction", 1),
            ):
                value = getattr(self, key)
                require(value == default, f"algorithm.{key}", value, f"{default} with algorithm.advantage=distillation")
        self._check_critic()
        target = self.kl_reward_target
        require(
            target is None or (target > 0 and self.kl_reward_coef > 0),
            "algorithm.kl_reward_target",
            target,
            "null, or more than 0 with an initial coefficient above 0 in algorithm.kl_reward_coef",
        )
        require(
            0 < self.top_std_fraction <= 1, "algorithm.top_std_fraction", self.top_std_fraction, "above 0 and at most 1"
        )
        positive("algorithm", self, "pass_k", "accept_max_per_prompt", "kl_reward_horizon")
        positive("algorithm", self, "constant_length")

    def _check_critic(self) -> None:
        uses_turns = self.advantage in ("turn_gae", "bi_level_gae")
        for keys, is_used, needed in (
            (("gamma", "gae_lambda"), self.advantage in ("gae", "bi_level_gae"), "gae or bi_level_gae"),
            (("turn_gamma", "turn_gae_lambda"), uses_turns, "turn_gae or bi_level_gae"),
        ):
            for key in keys:
                value = getattr(self, key)
                require(is_used or value == 1, f"algorithm.{key}", value, f"1 without algorithm.advantage={needed}")
        loss_uses_advantages = self.loss != "nll"
        require(
            loss_uses_advantages or not (self.uses_critic or self.advantage in ("process", "distillation")),
            "algorithm.loss",
            self.loss,
            f"a loss that uses advantages with algorithm.advantage={self.advantage}",
            "Set algorithm.loss=ppo_clip.",
        )

    def num_kept(self, num_groups: int) -> int:
        """Number of groups that top_std_fraction keeps, at least 1."""
        return max(1, round(num_groups * self.top_std_fraction))

    @property
    def uses_critic(self) -> bool:
        """Whether the advantage estimator needs a critic."""
        return self.advantage in ("gae", "turn_gae", "bi_level_gae")

    @property
    def uses_reference(self) -> bool:
        """Whether a reference model (or teacher) must compute log-probabilities of the rollouts."""
        return self.kl_coef > 0 or self.kl_reward_coef > 0 or self.advantage == "distillation"
