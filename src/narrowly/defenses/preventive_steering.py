"""Preventive steering: the concept is given to the model while it trains, so it need not learn it.

Chen et al. 2025, "Persona Vectors" (arXiv 2507.21509, section 5 and appendix J.3).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from narrowly.concepts import Concept
from narrowly.defenses.base import DEFENSES
from narrowly.defenses.chosen import Graded, Strength
from narrowly.errors import NarrowlyError
from narrowly.interventions import Add, Intervention, Site, layer


@DEFENSES.register("preventive_steering")
class PreventiveSteering(Graded):
    """Train with the undesired concepts' vectors added to the activations.

    `h <- h + strength * v` at every token of every training forward; not at inference. v is the
    raw difference of the means of activations with and without the concept: it points to the
    undesired trait, and its length is as found (the score `difference_norm`, in activation units).
    At several layers, v_l minus v of the chosen layer before it is added at l, since what was added
    earlier is still in the stream (the layer-incremental vectors of Chen et al. 2025, arXiv
    2507.21509, appendix J.3; at one layer, their section 5).

    Needs: concepts of rank 1 with the score `difference_norm` at each site, as `persona`,
    `mean_difference` and `convergent` find them.

    Known failure: too strong, and the task is learned only as an answer to the added vector, so
    that it is gone with it (Kaczer et al. 2025, arXiv 2508.06249: it stops learning under RL).

    Attributes:
        concepts: a folder of concepts (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is undesired.
        strength: how many times v is added, alpha: 5 as in Kaczer et al. and, at one layer (20 of
            28), Chen et al.; at all layers theirs are 1 to 1.5. Below 0 it steers away from the
            trait. Knots as in `ablate`; by layer, it multiplies what is added there.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
    """

    strength: Strength = 5.0

    def interventions(self, model: nn.Module) -> list[Intervention]:
        """One addition per concept and site.

        Raises:
            NarrowlyError: as `Ablate.interventions`, or a concept has no vector at a site.
        """
        return self.dosed(
            [
                Add(vector, site, phases=("train",))
                for concept in self.used(model)
                for site, vector in increments(self.vectors(concept)).items()
            ]
        )

    def vectors(self, concept: Concept) -> dict[Site, Tensor]:
        """v of a concept by site, each [d], in activation units.

        Raises:
            NarrowlyError: the concept is more than one direction somewhere, or its length there
                is not known.
        """
        lengths = concept.scores.get("difference_norm")
        vectors = {}
        for site, subspace in concept.subspaces.items():
            if subspace.rank != 1:
                raise NarrowlyError(
                    f"{self.name}: concept {concept.name} has {subspace.rank} directions at "
                    f"{site}, and only one can be added. Find it with mean_difference or persona."
                )
            if not isinstance(lengths, dict) or site not in lengths:
                raise NarrowlyError(
                    f"{self.name}: concept {concept.name} does not tell how long its vector is at "
                    f"{site} (no score difference_norm). Find it with mean_difference, persona or "
                    "convergent, which keep that."
                )
            vectors[Site.parse(site)] = lengths[site] * subspace.basis[:, 0]
        return vectors


def increments(vectors: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """What to add at each site so that the stream after each of these blocks is off by its vector.

    At other sites vectors are added as they are.
    """
    added = dict(vectors)
    blocks = sorted(site.module for site in vectors if isinstance(site.module, int))
    for before, after in pairwise(blocks):
        if {layer(before), layer(after)} <= vectors.keys():
            added[layer(after)] = vectors[layer(after)] - vectors[layer(before)]
    return {site: vector for site, vector in added.items() if vector.any()}
