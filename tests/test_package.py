"""What holds for the package as a whole."""

import subprocess
import sys
import time

import pytest


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("module", ["narrowly", "narrowly.cli", "narrowly.report"])
def test_importing_loads_no_torch(module):
    heavy = "('torch', 'transformers', 'numpy.linalg', 'datasets')"
    if module == "narrowly.report":
        heavy = "('torch', 'transformers')"
    assert (
        python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])") == "[]\n"
    )


def test_every_public_name_is_there():
    python("import narrowly; [getattr(narrowly, name) for name in narrowly.__all__]")
    assert "ablate" in python("import narrowly; print(dir(narrowly))")


def test_help_takes_less_than_half_a_second_beyond_the_interpreter():
    def best(*arguments: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("-m", "narrowly.cli", "--help") - best("-c", "pass") < 0.5


def test_an_unknown_plugin_names_the_nearest():
    from narrowly.defenses import DEFENSES
    from narrowly.errors import NarrowlyError

    with pytest.raises(NarrowlyError, match="Did you mean"):
        DEFENSES["ablat"]
    assert {"ablate", "interleave"} <= {*DEFENSES.names()}
    with pytest.raises(ValueError, match="registered twice"):
        DEFENSES.register("ablate")(object)
