"""Many runs from one file, compared fairly: models, data, defenses, hyper-parameters, seeds."""

from narrowly.sweeps.file import Sweep
from narrowly.sweeps.runner import sweep

__all__ = ["Sweep", "sweep"]
