"""Damages to the core that the simulation must notice: what "the simulation passed" is worth.

Each is one small slip of the kind that a later change could make. ``old`` must occur exactly once
in its file, so whoever changes that place in the core is told to move the mutant too. A damage that
changes nothing anybody could see is no mutant: then the code that it touches is not needed.
"""

from tests.sim.mutants_adapters import ADAPTERS
from tests.sim.mutants_away import AWAY
from tests.sim.mutants_donors import DONORS
from tests.sim.mutants_leaving import LEAVING
from tests.sim.mutants_lives import LIVES
from tests.sim.mutants_memory import MEMORY
from tests.sim.mutants_scores import SCORES
from tests.sim.mutants_stranded import STRANDED

MUTANTS = [*MEMORY, *LIVES, *ADAPTERS, *SCORES, *LEAVING, *STRANDED, *AWAY, *DONORS]
