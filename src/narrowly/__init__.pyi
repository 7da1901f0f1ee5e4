from .concepts import find as find
from .concepts import load_concepts as load_concepts
from .concepts import save_concepts as save_concepts
from .defenses.ablate import ablate as ablate
from .errors import NarrowlyError as NarrowlyError
from .evals import evaluate as evaluate
from .interventions import Add as Add
from .interventions import Clamp as Clamp
from .interventions import Function as Function
from .interventions import LowRankAffine as LowRankAffine
from .interventions import Noise as Noise
from .interventions import ProjectOut as ProjectOut
from .interventions import Scale as Scale
from .interventions import Set as Set
from .interventions import Site as Site
from .interventions import attach as attach
from .interventions import capture as capture
from .interventions import layer as layer
from .interventions import load_interventions as load_interventions
from .interventions import save_interventions as save_interventions
from .interventions import site as site
from .models import load_model as load_model
from .report import compare as compare
from .training import AblationCallback as AblationCallback
from .training import defend as defend
from .training import train as train

__version__: str
