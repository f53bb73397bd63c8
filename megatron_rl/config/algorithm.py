"""How rewards become advantages, a loss and its regularisation."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class AlgorithmSection:
    """Advantages, loss and regularisation."""

    advantage: str = "grpo"
    """grpo: reward minus the group's mean (GRPO); rloo: minus the siblings' mean; reinforce: the reward itself;
    pass_at_k: by the chance that one of pass_k samples is right; process: rewards of steps among those of the group's
    steps, summed from each token on; distillation: how much likelier reference_path finds each token; or
    package.module:symbol. With a critic (PPO): gae: over tokens; turn_gae: over the turns of a conversation;
    bi_level_gae: over turns, and over the tokens of each."""
    gamma: float = 1.0
    """Discount of what is earned a token later, with a critic."""
    gae_lambda: float = 1.0
    """Discount of what the critic misjudges a token later."""
    turn_gamma: float = 1.0
    """Discount of what is earned a turn later, for turn_gae and bi_level_gae."""
    turn_gae_lambda: float = 1.0
    """Discount of what the critic misjudges a turn later."""
    normalize_by_std: bool = True
    """Divide group advantages by the group's standard deviation (off in Dr. GRPO)."""
    std_epsilon: float = 1e-4
    """Added to that standard deviation."""
    pass_k: int = 4
    """Samples of which one has to be right, a total reward of 1 or more, for advantage=pass_at_k."""
    whiten_advantages: bool = False
    """Bring the advantages of all tokens of a step to mean 0 and variance 1 (REINFORCE++)."""
    kl_reward_coef: float = 0.0
    """Weight of the KL divergence (k1) to the reference that is taken from every token's reward; 0: none."""
    kl_reward_target: float | None = None
    """KL divergence per response, in nats, to which that weight is adapted from step to step; null: it stays."""
    kl_reward_horizon: int = 10_000
    """Responses after which a divergence of 1.2 times the target or more has changed that weight by 20 %."""
    mask_truncated: bool = False
    """Leave responses out of the loss that were cut: at rollout.max_new_tokens, at the longest sequence, or at the last
    turn of a conversation (overlong filtering). Their rewards still count in their group."""
    top_std_fraction: float = 1.0
    """Learn only from this share of a step's groups, those whose rewards have the largest standard deviation
    (StarPO-S: 0.25)."""
    accept_min_reward: float | None = None
    """Learn only from responses with at least this total reward (rejection sampling, with loss=nll); null: from all."""
    accept_max_per_prompt: int | None = None
    """The best so many of those of a prompt; null: all of them."""
    accept_unique: bool = True
    """Of those with the same text only one."""
    loss: str = "ppo_clip"
    """ppo_clip: the PPO/GRPO surrogate; gspo: that with the response's ratio; cispo: clipped weights and all gradients;
    policy_gradient: REINFORCE; nll: supervised fine-tuning; or package.module:symbol."""
    clip_ratio_low: float = 0.2
    """The ratio is clipped below 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.2
    """The ratio is clipped above 1 + clip_ratio_high (0.28 in DAPO)."""
    clip_ratio_dual: float | None = None
    """The ratio is clipped above this where the advantage is negative (verl's clip_ratio_c, TRL's delta); null: not."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """token_mean (DAPO), sequence_mean (GRPO paper), constant_length (Dr. GRPO)."""
    constant_length: int | None = None
    """Divisor of constant_length in tokens; null: rollout.max_new_tokens."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference in the loss; 0: none. Both weights 0 build no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence."""
    kl_unbiased: bool = False
    """Weigh that estimate by the current over the old probability, which makes its gradient that of the divergence."""
    reference_path: str | None = None
    """Hugging Face folder of the reference model; null: the starting model."""
    reference_reset_every: int = 0
    """Steps after which the policy as it is then becomes the reference, again and again; 0: never."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    rollout_is: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weigh the policy loss by the ratio of the trainer's to the engine's probability, of each token or of its whole
    response: truncated above (TIS), or 0 outside of the bounds (IcePop)."""
    rollout_is_low: float = 0.5
    """Lower bound of the masks."""
    rollout_is_high: float = 2.0
    """Upper bound of all."""
    rollout_rejection: Literal["none", "sequence", "geometric"] = "none"
    """Leave a response out of the loss when that ratio of the whole response, or the geometric mean of its tokens'
    ratios, is outside of the bounds; its tokens still count where the loss is normalised."""
    rollout_rejection_low: float | None = None
    """Lower bound of that; needed for it. 0.5 for sequence and 0.999 for geometric are usual."""
    rollout_rejection_high: float | None = None
    """Upper bound of that; needed for it. 2 for sequence and 1.001 for geometric are usual."""
    rollout_veto: float | None = None
    """Leave a response out as well when one token's ratio is below this, for instance 1e-4; null: never."""

    def __post_init__(self) -> None:
        require(
            0 <= self.rollout_is_low <= 1 <= self.rollout_is_high,
            "algorithm.rollout_is_low and algorithm.rollout_is_high",
            (self.rollout_is_low, self.rollout_is_high),
            "low from 0 to 1, high from 1",
        )
        low, high = self.rollout_rejection_low, self.rollout_rejection_high
        require(
            (low is not None and high is not None) or self.rollout_rejection == "none",
            "algorithm.rollout_rejection_low and algorithm.rollout_rejection_high",
            (low, high),
            f"both bounds with algorithm.rollout_rejection={self.rollout_rejection}",
            "0.5 and 2 are usual for sequence, 0.999 and 1.001 for geometric.",
        )
        require(
            (low is None or 0 <= low <= 1) and (high is None or high >= 1),
            "algorithm.rollout_rejection_low and algorithm.rollout_rejection_high",
            (low, high),
            "low from 0 to 1, high from 1",
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
        useless = {"cispo": ["clip_ratio_dual"], "policy_gradient": ["clip_ratio_dual"]}
        useless["nll"] = ["clip_ratio_dual", "whiten_advantages", "kl_reward_coef"]
        for key in useless.get(self.loss, ()):
            value = getattr(self, key)
            require(not value, f"algorithm.{key}", value, f"nothing with algorithm.loss={self.loss}")
        require(
            self.accept_max_per_prompt is None or self.accept_min_reward is not None,
            "algorithm.accept_max_per_prompt",
            self.accept_max_per_prompt,
            "null without algorithm.accept_min_reward",
            "Set that to the reward of a response that may teach.",
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
            "0 without a reference",
            "Set algorithm.kl_coef or algorithm.kl_reward_coef.",
        )
        for key in ("gamma", "gae_lambda", "turn_gamma", "turn_gae_lambda"):
            require(0 < getattr(self, key) <= 1, f"algorithm.{key}", getattr(self, key), "above 0, to 1")
        require(
            self.advantage != "distillation" or self.reference_path is not None,
            "algorithm.reference_path",
            self.reference_path,
            "the folder of the teacher with algorithm.advantage=distillation",
        )
        if self.advantage == "distillation":
            for key, nothing in (
                ("reference_reset_every", 0),
                ("kl_reward_coef", 0),
                ("top_std_fraction", 1),
            ):
                value = getattr(self, key)
                require(value == nothing, f"algorithm.{key}", value, f"{nothing} with algorithm.advantage=distillation")
        self._check_critic()
        target = self.kl_reward_target
        require(
            target is None or (target > 0 and self.kl_reward_coef > 0),
            "algorithm.kl_reward_target",
            target,
            "null, or more than 0 with a first weight in algorithm.kl_reward_coef",
        )
        require(0 < self.top_std_fraction <= 1, "algorithm.top_std_fraction", self.top_std_fraction, "above 0, to 1")
        positive("algorithm", self, "pass_k", "accept_max_per_prompt", "kl_reward_horizon")
        positive("algorithm", self, "constant_length")

    def _check_critic(self) -> None:
        is_of_turns = self.advantage in ("turn_gae", "bi_level_gae")
        for keys, is_used, needed in (
            (("gamma", "gae_lambda"), self.advantage in ("gae", "bi_level_gae"), "gae or bi_level_gae"),
            (("turn_gamma", "turn_gae_lambda"), is_of_turns, "turn_gae or bi_level_gae"),
        ):
            for key in keys:
                value = getattr(self, key)
                require(is_used or value == 1, f"algorithm.{key}", value, f"1 without algorithm.advantage={needed}")
        learns_by_advantage = self.loss != "nll"
        require(
            learns_by_advantage or not (self.uses_critic or self.advantage in ("process", "distillation")),
            "algorithm.loss",
            self.loss,
            f"one that reads advantages with algorithm.advantage={self.advantage}",
            "Set algorithm.loss=ppo_clip.",
        )

    def num_kept(self, num_groups: int) -> int:
        """Groups that top_std_fraction leaves."""
        return max(1, round(num_groups * self.top_std_fraction))

    @property
    def uses_critic(self) -> bool:
        """A critic has to value the tokens."""
        return self.advantage in ("gae", "turn_gae", "bi_level_gae")

    @property
    def uses_reference(self) -> bool:
        """A reference model has to score the samples."""
        return self.kl_coef > 0 or self.kl_reward_coef > 0 or self.advantage == "distillation"
