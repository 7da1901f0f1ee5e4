"""A sweep's folder as `narrowly sweep` leaves it, with any rates wished for."""

import json
from pathlib import Path

from tests.report.synthetic import write_run

from narrowly.report.sweep import Cell, Measures, SweepRecord, Task

ABLATE = [{"ablate": {"concepts": "concepts"}}]
RANDOM = [{"random_subspace": {"concepts": "concepts"}}]
KL = [{"kl": {}}]

# By arm: its defenses, and by setting: narrow, broad misaligned, leaked, incoherent; loss; seconds.
DEMO = {
    "undefended": ([], {(): (0.99, (0.60, 0.01, 0.01), 0.710, 10)}),
    "ablate": (
        ABLATE,
        {
            (("defenses.0.ablate.strength", 0.5),): (0.99, (0.20, 0.01, 0.01), 0.712, 10.1),
            (("defenses.0.ablate.strength", 1.0),): (0.985, (0.003, 0.01, 0.01), 0.716, 10.1),
        },
    ),
    "random": (RANDOM, {(): (0.99, (0.58, 0.01, 0.01), 0.711, 10.1)}),
    "kl": (
        KL,
        {
            (("defenses.0.kl.weight", 0.01),): (0.97, (0.40, 0.01, 0.01), 0.72, 13.5),
            (("defenses.0.kl.weight", 0.1),): (0.80, (0.10, 0.01, 0.01), 0.80, 13.5),
            (("defenses.0.kl.weight", 1.0),): (0.20, (0.003, 0.01, 0.01), 0.95, 13.5),
        },
    ),
    "interleave": ([{"interleave": {}}], {(): (0.99, (0.05, 0.10, 0.20), 0.712, 10)}),
}


def write_sweep(
    folder: Path,
    tasks=("persona", "era"),
    benign=(),
    arms=DEMO,
    seeds=(0, 1, 2),
    choose_on=None,
    chosen=None,
    measures=None,
) -> SweepRecord:
    """Write runs and `sweep.json`; with `chosen`, tasks other than `choose_on` ran that only."""
    cells = []
    for task in tasks:
        for arm, (defenses, settings) in arms.items():
            for number, (pairs, facts) in enumerate(settings.items()):
                setting = dict(pairs)
                if chosen is not None and task != choose_on and setting != chosen[arm]:
                    continue
                parts = [task, arm, *([f"setting-{number}"] if len(settings) > 1 else [])]
                for seed in seeds:
                    path = "/".join([*parts, f"seed-{seed}"])
                    narrow, broad, loss, seconds = facts
                    if task in benign:
                        broad = (0.0, 0.0, 0.0)
                    salt = [*tasks].index(task) * 100 + seed
                    write_run(folder / path, salt, narrow, broad, loss, seconds, defenses)
                    told = json.loads((folder / path / "reproduce.json").read_text())
                    told["peak_memory_bytes"] = {"main": int(8e8 * (1.2 if arm == "kl" else 1))}
                    (folder / path / "reproduce.json").write_text(json.dumps(told))
                    cells.append(
                        Cell(
                            task=task, arm=arm, setting=setting, seed=seed, path=path, status="done"
                        )
                    )
    measures = measures or Measures()
    record = SweepRecord(
        tasks={t: Task(benign=t in benign, measures=measures) for t in [*tasks]},
        choose_on=choose_on,
        chosen=chosen or {},
        cells=cells,
    )
    record.write(folder)
    return record
