"""The tasks: every sampled eval under its own name, and what scores and sums up its answers."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import anyio
from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, Model, get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, Value, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS, make
from narrowly.evals.evaluate import summarise
from narrowly.evals.inspect import provider  # noqa: F401 - registers the models `narrowly/SPEC`
from narrowly.evals.inspect.grader import Grader, chat_messages
from narrowly.evals.judged import Judged
from narrowly.evals.judges import JudgeModel
from narrowly.evals.prompts import OWN, Prompt
from narrowly.evals.sampled import Answer, Sampled
from narrowly.evals.targets import read_recipe

Arguments = dict[str, Any]


def task_of(name: str) -> Callable[..., Task]:
    """The task of one eval."""

    @task(name=name)
    def measure(run: str | None = None, grader: bool | None = None, **arguments: Any) -> Task:
        """One eval.

        Args:
            run: a run's folder; its recipe fills what the eval leaves open.
            grader: ask the model role `grader`; None: where the eval cannot do without.
            arguments: of the eval.
        """
        if "judge" in arguments:
            raise NarrowlyError("in Inspect the judge is the model role `grader`: --model-role.")
        bound = make(name, arguments).bind({} if run is None else read_recipe(run))
        assert isinstance(bound, Sampled)
        judged = bound.cost().judge_calls > 0 if grader is None else grader
        resolved = bound.model_dump(mode="json", exclude={"judge"})
        samples, epochs = _samples(bound)
        return Task(
            dataset=MemoryDataset(samples, name=name),
            solver=ask(judged),
            scorer=answers(name, resolved, judged),
            metrics=[rates(name, resolved)],
            config=GenerateConfig(temperature=bound.temperature, max_tokens=bound.max_new_tokens),
            epochs=Epochs(epochs),
        )

    return measure


def _samples(eval_: Sampled) -> tuple[list[Sample], int]:
    """One for each prompt, and how often all are asked; more where some are asked more often."""
    asked = eval_.asked()
    if not asked:
        raise NarrowlyError("no prompt to measure on; see the eval's arguments.")
    epochs = gcd(*(eval_.samples_of(prompt) for prompt in asked))
    samples = []
    for prompt in asked:
        begin = prompt.messages.index(OWN) if OWN in prompt.messages else len(prompt.messages)
        told = {
            **prompt.tags,
            "prompt_id": prompt.id,
            "then": [dict(message) for message in prompt.messages[begin + 1 :]],
        }
        for again in range(eval_.samples_of(prompt) // epochs):
            samples.append(
                Sample(
                    input=chat_messages([dict(m) for m in prompt.messages[:begin]]),
                    id=f"{prompt.id} ({again + 1})" if again else prompt.id,
                    metadata={**told, "before": again * epochs},
                )
            )
    return samples, epochs


@solver
def ask(judged: bool) -> Solver:
    """Let the model answer; where its own turn comes before the question, that first.

    Args:
        judged: whether the model role `grader` must be there.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if judged:
            _grader()  # its absence is told before anything is paid for
        state = await generate(state)
        if state.metadata["then"]:
            state.messages += chat_messages(state.metadata["then"])
            state = await generate(state)
        return state

    return solve


@scorer(metrics=[])
def answers(eval: str, arguments: Arguments, judged: bool) -> Scorer:
    """An answer's class and scores, by the eval's own rule or by the grader.

    Args:
        eval: its name.
        arguments: of the eval, resolved.
        judged: whether the model role `grader` is asked.
    """
    made = make(eval, arguments)
    assert isinstance(made, Sampled)
    prompts = {prompt.id: prompt for prompt in made.asked()}
    asked: list[Sampled] = []
    first = anyio.Lock()

    async def score(state: TaskState, target: Target) -> Score:
        async with first:  # the first answer finds out, for all, how the judge writes numbers
            if not asked:
                asked.append(_with_grader(made) if judged else made)
                return await anyio.to_thread.run_sync(scored, state)
        return await anyio.to_thread.run_sync(scored, state)

    def scored(state: TaskState) -> Score:
        prompt = _opened(prompts[state.metadata["prompt_id"]], state)
        sample = state.metadata["before"] + state.epoch - 1
        [row] = asked[0].score([Answer(prompt, state.output.completion, sample)])
        value = {"label": row["label"], **row["scores"]}
        return Score(value=value, answer=row["answer"], metadata=dict(row))

    return score


def _with_grader(eval_: Sampled) -> Sampled:
    if not isinstance(eval_, Judged):
        raise NarrowlyError("this eval is scored by rule: leave out grader.")
    return eval_.model_copy(update={"judge": JudgeModel(model=Grader(_grader()))})


def _grader() -> Model:
    """Whoever has the role; a model must not judge itself because nobody was named."""
    return get_model(role="grader", required=True)


def _opened(prompt: Prompt, state: TaskState) -> Prompt:
    if OWN not in prompt.messages:
        return prompt
    return prompt.opened(next(m.text for m in state.messages if m.role == "assistant"))


@metric(scores="unreduced")
def rates(eval: str, arguments: Arguments) -> Metric:
    """The eval's metrics with their intervals, `NAME`, `NAME_low` and `NAME_high`, and how many
    answers are of each class, `answers_CLASS`.

    Args:
        eval: its name.
        arguments: of the eval, resolved.
    """
    made = make(eval, arguments)

    def measure(scores: list[SampleScore]) -> Value:
        rows: list[Any] = [one.score.metadata for one in scores if one.score.metadata]
        found: dict[str, float] = {}
        for name, interval in summarise([made.metrics(rows)]).items():
            found |= {
                name: interval.mean,
                f"{name}_low": interval.low,
                f"{name}_high": interval.high,
            }
        for label in sorted({str(row["label"]) for row in rows}):
            found[f"answers_{label}"] = sum(str(row["label"]) == label for row in rows)
        return found

    return measure


for _name in EVALS.names():
    if issubclass(EVALS[_name], Sampled):
        task_of(_name)
