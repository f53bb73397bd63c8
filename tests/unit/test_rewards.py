"""Reward functions, and the pool of worker processes that runs them."""

from collections.abc import Iterator

import pytest

from megatron_rl.config.reward import RewardFunctionSection, RewardSection
from megatron_rl.errors import ConfigError, RewardError
from megatron_rl.rewards.arithmetic import evaluate
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.registry import REWARDS, build_grader
from megatron_rl.rewards.types import RewardInput
from tests.limits import LIMIT_S


def sample(response: str, answer: str | None = "42", finish_reason: str = "stop", **metadata: object) -> RewardInput:
    return RewardInput(
        prompt="",
        response=response,
        answer=answer,
        finish_reason=finish_reason,
        num_tokens=len(response),
        seed=1,
        metadata=metadata,
    )


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so \boxed{42}", "42", 1),
        (r"\boxed{41}", "42", 0),
        (r"\boxed{1} then \boxed{42}", "42", 1),
        (r"\boxed{42} then \boxed{1}", "42", 0),
        (r"\boxed{1,234}", "1234", 1),
        (r"\boxed{1,2}", "12", 0),
        (r"\boxed{42.0}", "42", 1),
        (r"\boxed{\frac{2}{4}}", r"\frac12", 1),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"\boxed{0.333}", r"\frac{1}{3}", 0),
        ("no answer", "42", 0),
    ],
)
def test_math_grades_boxed_answers(response: str, answer: str, expected: float) -> None:
    assert REWARDS["math"](sample(response, answer)) == expected


@pytest.mark.parametrize(
    ("response", "finish_reason", "expected"),
    [("42", "stop", 1), (" 42 ", "stop", 1), ("12,3>42", "stop", 1), ("42>12", "stop", 0), ("42", "length", 0)],
)
def test_exact_match_grades_the_text_after_a_mark(response: str, finish_reason: str, expected: float) -> None:
    assert REWARDS["exact_match"](sample(response, finish_reason=finish_reason), after=">") == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a\nb</think>\n<answer>c</answer>\n", 1),
        ("<think>a</think>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
    ],
)
def test_format_requires_the_tags_and_nothing_around_them(response: str, expected: float) -> None:
    assert REWARDS["format"](sample(response)) == expected


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (6, 0), (7, -0.25), (9, -0.75), (10, -1), (25, -1)])
def test_soft_overlong_penalizes_the_last_tokens(length: int, expected: float) -> None:
    assert REWARDS["soft_overlong"](sample("x" * length), max_tokens=10, buffer_tokens=4) == expected


def test_soft_overlong_needs_a_buffer_that_fits() -> None:
    with pytest.raises(RewardError, match=r"buffer_tokens=11 is not from 1 to max_tokens=10"):
        REWARDS["soft_overlong"](sample("x"), max_tokens=10, buffer_tokens=11)


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "expected"),
    [
        ("2 * 3 * 4", [2, 3, 4], 24, 1.0),
        ("2+3+4", [2, 3, 4], 24, 0.1),
        ("8*3", [2, 3, 4], 24, 0.1),
        ("4*6", [2, 4, 6], 24, 0.1),
        ("4*6*1*1", [1, 4, 6], 24, 0.1),
        ("2*2*6", [2, 2, 6], 24, 1.0),
        ("2*3*4 = 24", [2, 3, 4], 24, 0.1),
        ("", [2, 3, 4], 24, 0.1),
        ("04*6", [4, 6], 24, 0.1),
        ("4/(2-2)", [4, 2, 2], 24, 0.1),
        ("(1+2)/3", [1, 2, 3], 1, 1.0),
        ("2**3", [2, 3], 8, 0.1),
        ("7//2", [7, 2], 3, 0.1),
        ("1.5", [1, 5], 1.5, 0.1),
        ("9**9**9**9", [9, 9, 9, 9], 1, 0.1),
        ("__import__('os').getpid()", [1], 1, 0.1),
        ("(" * 300 + "1" + ")" * 300, [1], 1, 0.1),
    ],
)
def test_countdown_grades_the_answered_expression(
    answer: str, numbers: list[int], target: float, expected: float
) -> None:
    assert REWARDS["countdown"](sample(f"<answer>{answer}</answer>", nums=numbers, target=target)) == expected
    assert REWARDS["countdown"](sample(answer, nums=numbers, target=target)) == 0


def test_evaluate_rejects_everything_but_arithmetic() -> None:
    assert evaluate("-(3 - 5) / 4")[0] * 2 == 1
    for text in ("a", "1 if 2 else 3", "f(1)", "True", "1 < 2", "1" + "+1" * 400):
        with pytest.raises(ValueError):
            evaluate(text)


def test_weighted_rewards_are_summed_and_unknown_names_rejected() -> None:
    grader = build_grader([RewardFunctionSection(name="math"), RewardFunctionSection(name="format", weight=0.5)])
    assert grader(sample(r"<think>x</think><answer>\boxed{42}</answer>")) == (1.5, {"math": 1.0, "format": 1.0})
    with pytest.raises(ConfigError, match="Did you mean format"):
        build_grader([RewardFunctionSection(name="formats")])
    with pytest.raises(ConfigError, match=r"name='soft_overlong', options={'longest': 3}: missing a required argument"):
        build_grader([RewardFunctionSection(name="soft_overlong", options={"longest": 3})])
    with pytest.raises(ConfigError, match="module nowhere cannot be imported"):
        build_grader([RewardFunctionSection(name="nowhere:reward")])
    with pytest.raises(ConfigError, match="has no 'absent'"):
        build_grader([RewardFunctionSection(name="tests.own_rewards:absent")])


CUSTOM_REWARDS = {
    name: [RewardFunctionSection(name=f"tests.own_rewards:{name}")]
    for name in ("digit_share", "raises", "hangs_on", "exits", "nothing")
}


class TestPool:
    @pytest.fixture(scope="class")
    def pool(self) -> Iterator[RewardPool]:
        pool = RewardPool(RewardSection(timeout_s=60, num_workers=2), CUSTOM_REWARDS)
        yield pool
        pool.close()

    def test_many_requests_keep_their_order(self, pool: RewardPool) -> None:
        futures = [pool.submit("digit_share", [sample("1" * i + "x") for i in range(1, 5)]) for _ in range(20)]
        for future in futures:
            assert [r.total for r in future.result(LIMIT_S)] == [pytest.approx(i / (i + 1)) for i in range(1, 5)]

    def test_an_exception_is_an_error_and_not_a_zero(self, pool: RewardPool) -> None:
        (result,) = pool.submit("raises", [sample("x")]).result(LIMIT_S)
        assert (result.status, result.message) == ("reward_error", "ZeroDivisionError: this reward is broken")
        assert result.total != result.total

    def test_a_reward_without_a_number_is_an_error(self, pool: RewardPool) -> None:
        (result,) = pool.submit("nothing", [sample("x")]).result(LIMIT_S)
        assert result.status == "reward_error"

    def test_a_hanging_sample_is_killed_and_the_others_are_graded(self) -> None:
        pool = RewardPool(RewardSection(timeout_s=8), CUSTOM_REWARDS)
        samples = [sample("a"), sample("hang"), sample("b"), sample("hang"), sample("c")]
        results = pool.submit("hangs_on", samples).result(LIMIT_S)
        pool.close()
        assert [r.status for r in results] == ["ok", "reward_timeout", "ok", "reward_timeout", "ok"]

    def test_a_dying_worker_is_replaced(self, pool: RewardPool) -> None:
        results = pool.submit("exits", [sample("a"), sample("b")]).result(LIMIT_S)
        assert [r.status for r in results] == ["reward_error", "reward_error"]
        assert pool.submit("digit_share", [sample("11")]).result(LIMIT_S)[0].total == 1.0


def test_a_tower_of_powers_times_out() -> None:
    pool = RewardPool(RewardSection(timeout_s=8), {"train": [RewardFunctionSection(name="math")]})
    results = pool.submit("train", [sample("$9^{9^{9^9}}$", "1"), sample(r"\boxed{42}")]).result(LIMIT_S)
    assert [r.status for r in results] == ["reward_timeout", "ok"]
    pool.close()
