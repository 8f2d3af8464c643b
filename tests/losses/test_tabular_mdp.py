"""A token MDP small enough to solve exactly: which shaping leaves the soft-optimal policy alone, and which does not.

Three tokens and an end token; a state is the prefix so far; a response has at most four tokens, the end token included
(the only action left at depth three). Every response ends, there are 1 + 3 + 9 + 27 = 40 of them, and each has a random
reward, paid on its end token. All numbers are float64 and the solver is plain Python.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from prefdistill.losses import TERMINALS, shaping_return, soft_value, tvkd_loss

END, HORIZON = 3, 4
STATES = [prefix for n in range(HORIZON) for prefix in itertools.product(range(END), repeat=n)]
RESPONSES = [(*prefix, END) for prefix in STATES]  # every prefix may end, so there is one response for each
TEMPERATURES = [0.5, 1.0, 2.0]

State = tuple[int, ...]
Reward = Callable[[State, int], float]
Potential = Callable[[State], float]


def actions(state: State) -> list[int]:
    return [END] if len(state) == HORIZON - 1 else [*range(END), END]


def is_terminal(state: State) -> bool:
    return state[-1:] == (END,)


@dataclass
class Solution:
    values: dict[State, float]
    q: dict[State, dict[int, float]]
    policy: np.ndarray  # pi(a|s) for every state and its actions, in one fixed order

    def log_prob(self, response: State, b: float) -> float:
        steps = range(len(response))
        return sum((self.q[response[:t]][response[t]] - self.values[response[:t]]) / b for t in steps)


def solve(reward: Reward, b: float, discount: float = 1.0) -> Solution:
    """Backward induction: Q(s,a) = r(s,a) + g V(s'), V(s) = b log sum_a exp(Q(s,a)/b), pi = exp((Q - V)/b)."""
    values: dict[State, float] = {}
    q: dict[State, dict[int, float]] = {}
    for state in sorted(STATES, key=len, reverse=True):
        q[state] = {}
        for a in actions(state):
            following = (*state, a)
            q[state][a] = reward(state, a) + (0.0 if is_terminal(following) else discount * values[following])
        top = max(q[state].values())
        values[state] = top + b * math.log(sum(math.exp((x - top) / b) for x in q[state].values()))
    policy = [math.exp((q[state][a] - values[state]) / b) for state in STATES for a in actions(state)]
    return Solution(values, q, np.array(policy))


RNG = np.random.default_rng(0)
REWARDS = {response: float(RNG.normal()) for response in RESPONSES}
# A teacher with no relation to the task, with logits also for the states after an end token.
TEACHER = {state: torch.from_numpy(RNG.normal(size=END + 1)) for state in [*STATES, *RESPONSES]}
# It can emit only what the state allows.
for _state in STATES:
    TEACHER[_state][[a for a in range(END + 1) if a not in actions(_state)]] = -math.inf
TEACHER_VALUES = {state: soft_value(logits).item() for state, logits in TEACHER.items()}


def task(state: State, a: int) -> float:
    return REWARDS[(*state, a)] if a == END else 0.0


def shaped(potential: Potential, discount: float = 1.0) -> Reward:
    return lambda state, a: task(state, a) + discount * potential((*state, a)) - potential(state)


def with_constant_terminal(constant: float) -> Potential:
    return lambda state: constant if is_terminal(state) else TEACHER_VALUES[state]


def with_last_value(state: State) -> float:
    return TEACHER_VALUES[state[:-1] if is_terminal(state) else state]


def with_bootstrap(state: State) -> float:
    return TEACHER_VALUES[state]


POTENTIALS = {"last": with_last_value, "bootstrap": with_bootstrap, "zero": with_constant_terminal(0.0)}


def teacher_log_prob(state: State, a: int) -> float:
    return TEACHER[state].log_softmax(0)[a].item()


def teacher_logit(state: State, a: int) -> float:
    return TEACHER[state][a].item()


def responses_of(solution: Solution, b: float) -> np.ndarray:
    return np.exp([solution.log_prob(response, b) for response in RESPONSES])


def by_enumeration(scores: list[float], b: float) -> np.ndarray:
    """The soft-optimal distribution over whole responses, exp(score / b) / Z: no states, no induction."""
    weights = np.exp(np.array(scores) / b)
    return weights / weights.sum()


def library_returns(potential: Potential, terminal: str, discount: float = 1.0) -> torch.Tensor:
    """`shaping_return` of every response from its row of potentials, padded with NaN."""
    rows = np.full((len(RESPONSES), HORIZON + 1), np.nan)
    for i, response in enumerate(RESPONSES):
        rows[i, : len(response) + 1] = [potential(response[:t]) for t in range(len(response) + 1)]
    lengths = torch.tensor([len(response) for response in RESPONSES])
    return shaping_return(torch.from_numpy(rows), lengths, discount, terminal)


# --------------------------------------------------------- the MDP itself is right


@pytest.mark.parametrize("b", TEMPERATURES)
def test_backward_induction_agrees_with_enumerating_the_responses(b):
    solution = solve(task, b)
    scores = [REWARDS[response] for response in RESPONSES]
    np.testing.assert_allclose(responses_of(solution, b), by_enumeration(scores, b), rtol=1e-12)
    log_z = b * math.log(sum(math.exp(score / b) for score in scores))
    assert solution.values[()] == pytest.approx(log_z, abs=1e-12)


# ------------------------------------------------------------------- property 4


@pytest.mark.parametrize("b", TEMPERATURES)
@pytest.mark.parametrize("constant", [0.0, 2.5, -40.0])
def test_property_4_a_constant_terminal_potential_keeps_the_soft_optimal_policy(b, constant):
    plain, other = solve(task, b), solve(shaped(with_constant_terminal(constant)), b)
    np.testing.assert_allclose(other.policy, plain.policy, rtol=0, atol=1e-12)
    for state in STATES:  # and V' = V - Phi + constant: the shaping is not simply absent
        expected = plain.values[state] - TEACHER_VALUES[state] + constant
        assert other.values[state] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("b", TEMPERATURES)
@pytest.mark.parametrize("terminal", ["bootstrap", "last"])
def test_property_4_a_terminal_potential_that_varies_changes_the_policy(b, terminal):
    plain, other = solve(task, b), solve(shaped(POTENTIALS[terminal]), b)
    assert np.abs(other.policy - plain.policy).max() > 0.05
    # Exactly: pi'(y) is proportional to pi(y) exp(Phi(s_T) / b).
    tilted = [REWARDS[response] + POTENTIALS[terminal](response) for response in RESPONSES]
    np.testing.assert_allclose(responses_of(other, b), by_enumeration(tilted, b), rtol=1e-12)


@pytest.mark.parametrize("b", TEMPERATURES)
@pytest.mark.parametrize("term", [teacher_log_prob, teacher_logit])
def test_property_4_action_dependent_shaping_changes_the_policy(b, term):
    plain, other = solve(task, b), solve(lambda state, a: task(state, a) + term(state, a), b)
    assert np.abs(other.policy - plain.policy).max() > 0.05
    # Exactly: the term is summed along the response, and does not telescope.
    tilted = [REWARDS[y] + sum(term(y[:t], y[t]) for t in range(len(y))) for y in RESPONSES]
    np.testing.assert_allclose(responses_of(other, b), by_enumeration(tilted, b), rtol=1e-12)


@pytest.mark.parametrize("b", TEMPERATURES)
@pytest.mark.parametrize("terminal", TERMINALS)
def test_property_4_the_return_of_the_library_gives_the_policy_of_the_shaped_mdp(b, terminal):
    psi = library_returns(with_bootstrap, terminal)
    scores = [REWARDS[response] + p for response, p in zip(RESPONSES, psi.tolist(), strict=True)]
    solution = solve(shaped(POTENTIALS[terminal]), b)
    np.testing.assert_allclose(by_enumeration(scores, b), responses_of(solution, b), rtol=1e-12)
    unchanged = np.abs(by_enumeration(scores, b) - responses_of(solve(task, b), b)).max() < 1e-12
    assert unchanged == (terminal == "zero")


@pytest.mark.parametrize("b", TEMPERATURES)
def test_property_4_the_value_of_a_soft_optimal_teacher_is_the_optimal_soft_value(b):
    solution = solve(task, b)
    for state in STATES:
        logits = torch.full((END + 1,), -math.inf, dtype=torch.float64)
        for a, q in solution.q[state].items():
            logits[a] = q
        assert soft_value(logits, b).item() == pytest.approx(solution.values[state], abs=1e-12)


@pytest.mark.parametrize("b", TEMPERATURES)
def test_property_4_reward_plus_the_return_of_the_optimal_value_is_the_log_policy(b):
    """R(y) + 0 - V*(s_0) = b log pi*(y): under the optimal potential the shaped reward is the soft advantage."""
    solution = solve(task, b)
    psi = library_returns(lambda state: 0.0 if is_terminal(state) else solution.values[state], "zero")
    for response, p in zip(RESPONSES, psi.tolist(), strict=True):
        assert REWARDS[response] + p == pytest.approx(b * solution.log_prob(response, b), abs=1e-12)


def test_property_4_with_a_discount_the_agent_must_discount_too():
    """Invariance with g < 1 is for an agent that maximises sum_t g^t r_t. The formula's Psi adds psi_t undiscounted,
    which leaves -(1 - g) sum_{0<t<T} V(s_t): no constant, so even "zero" moves the policy."""
    b, g = 1.0, 0.9
    reward = shaped(with_constant_terminal(0.0), g)
    np.testing.assert_allclose(solve(reward, b, g).policy, solve(task, b, g).policy, rtol=0, atol=1e-12)

    psi = library_returns(with_bootstrap, "zero", g)
    scores = [REWARDS[response] + p for response, p in zip(RESPONSES, psi.tolist(), strict=True)]
    undiscounted = solve(reward, b)
    np.testing.assert_allclose(by_enumeration(scores, b), responses_of(undiscounted, b), rtol=1e-12)
    assert np.abs(undiscounted.policy - solve(task, b).policy).max() > 0.01


# --------------------------------------------------- what the student is led to


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("alpha", [0.7, -0.7])
def test_minimiser_of_the_expected_tvkd_loss(terminal, alpha):
    """All pairs, preferred with probability sigmoid(R(y) - R(y')): the gradient is zero exactly where
    pi(y) is proportional to ref(y) exp((R(y) - alpha Psi(y)) / beta), that is at DPO's own minimiser under "zero"."""
    beta = 0.5
    reward = torch.tensor([REWARDS[response] for response in RESPONSES], dtype=torch.float64)
    ref = torch.from_numpy(np.random.default_rng(1).normal(size=len(RESPONSES))).log_softmax(0)
    psi = library_returns(with_bootstrap, terminal)
    first, second = torch.triu_indices(len(RESPONSES), len(RESPONSES), 1)

    def steepness(scores: torch.Tensor) -> float:
        scores = scores.clone().requires_grad_()
        policy = scores.log_softmax(0)
        loss = 0.0
        for i, j in ((first, second), (second, first)):
            prob = torch.sigmoid(reward[i] - reward[j])
            pairs = tvkd_loss(policy[i], policy[j], ref[i], ref[j], psi[i], psi[j], beta=beta, alpha=alpha)
            loss = loss + (prob * pairs).sum()
        loss.backward()
        return scores.grad.abs().max().item()

    assert steepness(ref + (reward - alpha * psi) / beta) < 1e-12
    at_dpo_minimiser = steepness(ref + reward / beta)
    assert at_dpo_minimiser < 1e-12 if terminal == "zero" else at_dpo_minimiser > 0.1
