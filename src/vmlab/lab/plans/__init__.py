"""Plans: tests of machines for people who do not write Python, as `*.vmlab.toml`.

The public face: `Plan` is the document, `run_plan` runs it in a machine that somebody else has
made, `PlanResult` is what came of it. Which machine that is, and who reports it, is not decided
here.
"""

from __future__ import annotations

from vmlab.lab.plans.matrix import Cell
from vmlab.lab.plans.plan import SUFFIX, Plan
from vmlab.lab.plans.runner import PhaseResult, PlanResult, run_plan

__all__ = ["SUFFIX", "Cell", "PhaseResult", "Plan", "PlanResult", "run_plan"]
