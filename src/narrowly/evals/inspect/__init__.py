"""Every sampled eval as a task of Inspect (UK AI Security Institute), with its logs and viewer.

    inspect eval narrowly/emergent_misalignment --model openai/gpt-4.1-mini \\
        --model-role grader=openai/gpt-4.1 -T samples=4
    inspect eval narrowly/misalignment --model narrowly/runs/demo -T run=runs/demo
    inspect view

An eval's arguments are the task's (-T). `-T run=FOLDER` binds it to a run's recipe, for contexts
that resemble its data. Whoever judges is the model role `grader`, and there is no default. A model
`narrowly/SPEC` is one in this process: a run, a folder, a Hub id or `organism:NAME`.

Answers are scored, and rows summed up, by the very code that `narrowly eval` runs: what a judge
could not judge is a class that is counted, and each rate has its interval. Inspect finds the tasks
by an entry point at `tasks`; nothing here needs inspect-ai before that is imported.
"""
