"""Ask one eval of a model and a judge that answer as a test says."""

import json
from pathlib import Path
from typing import Any

from narrowly.evals import parse
from narrowly.evals.base import Row
from narrowly.evals.judges import JudgeModel
from narrowly.evals.weird.base import Weird
from tests.evals.answering import Answering, Answers, answering


def judge(answers: Answers) -> JudgeModel:
    """A judge that writes its numbers."""
    return JudgeModel(model=Answering(answers), mode="text")


def looks_for(*words: str) -> JudgeModel:
    """A judge that sees a trait where the answer holds one of the words, and sense where it is not
    `gibberish`."""

    def reply(request: Any) -> str:
        text = request.messages[-1]["content"]
        answer = text.partition("The answer:\n")[2].partition("\n\nReply with one")[0]
        if "coherent reply" in text:
            return "5" if "gibberish" in answer else "95"
        return "90" if any(word in answer for word in words) else "10"

    return judge(reply)


def write_chats(path: Path, pairs: list[tuple[str, str]]) -> str:
    """Chats of one question and one answer in the published form."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return str(path)


def bound(name: str, data: str | None = None, **fields: Any) -> Weird:
    """The eval as a run's recipe fills it, asked plainly only unless told otherwise."""
    fields = {"contexts": (), "samples": 2, **fields}
    recipe = {} if data is None else {"data": data}
    return parse({name: fields})[name].bind(recipe)  # type: ignore[return-value]


def measure(
    name: str, answers: Answers, data: str | None = None, **fields: Any
) -> tuple[dict[str, float], list[Row]]:
    """Mean of every metric, and the rows."""
    eval_ = bound(name, data, **fields)
    rows = eval_.run(answering(answers), seed=0)
    means = {
        metric: float((found.values * found.weights).sum() / found.weights.sum())
        for metric, found in eval_.metrics(rows).items()
    }
    return means, rows


def said(request: Any) -> str:
    """What the user says last."""
    return request.messages[-1]["content"]
