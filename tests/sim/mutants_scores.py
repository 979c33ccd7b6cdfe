"""Mutants of what concerns log probabilities of prompts; see ``mutants.py``."""

from tests.sim.mutation import Mutant

SCORES = [
    Mutant(
        "placing.py",
        "if not group.up.limits.shares_prefix or sequence.scores_prompt:",
        "if not group.up.limits.shares_prefix:",
        "a prompt that is to be scored is not computed as a whole",
    ),
    Mutant(
        "state.py",
        "return PROMPT_LOGPROBS in self.facts.needs",
        "return False",
        "nobody's prompt is to be scored",
    ),
    Mutant(
        "planning.py",
        "            self.scored = (*self.scored, sequence.id)\n",
        "            pass\n",
        "a worker may leave log probabilities of a prompt out",
    ),
    Mutant(
        "scoring.py",
        "follows = 0 < start <= sequence.scored and",
        "follows = 0 < start and",
        "log probabilities of a prompt may have gaps",
    ),
    Mutant(
        "scoring.py",
        "told[request] <= sequence.prompt_len",
        "told[request] <= sequence.prompt_len + 1",
        "there may be one for the token behind the prompt",
    ),
    Mutant(
        "scoring.py",
        "any(request == failed for failed, _ in event.failures)",
        "False",
        "a sequence that failed ends its group",
    ),
    Mutant(
        "scoring.py",
        "max(sequence.scored, told.get(request, 0)) < sequence.prompt_len",
        "told.get(request, 0) < sequence.prompt_len",
        "what came in earlier steps counts for nothing",
    ),
    Mutant(
        "scoring.py",
        "max(sequence.scored, told.get(request, 0)) < sequence.prompt_len",
        "sequence.scored < sequence.prompt_len",
        "what comes with the first token counts for nothing",
    ),
    Mutant(
        "scoring.py",
        "fresh = values[sequence.scored - start :]",
        "fresh = values",
        "what was delivered before a loss is delivered again",
    ),
    Mutant(
        "scoring.py",
        "            sequence.scored += len(fresh)\n",
        "",
        "it is forgotten what was delivered",
    ),
    Mutant(
        "scoring.py",
        "if sequence is None or not 0 < sequence.admitted_by <= plan_id:",
        "if sequence is None or not 0 < sequence.admitted_by:",
        "what an earlier life told is taken for this one's",
    ),
    Mutant(
        "scheduler.py",
        "if delivery.requests or delivery.prompts else closings",
        "if delivery.requests else closings",
        "log probabilities that come without a token are lost",
    ),
    Mutant(
        "scheduler.py",
        "Deliver([], [], [], scores)",
        "Deliver([], [], [])",
        "log probabilities of prompts are not delivered",
    ),
]
