"""Allocation: one option per item within budgets, by interchangeable solvers; plain numbers in, no model in sight."""

from lq.allocation.exact import Exact as Exact
from lq.allocation.greedy import Greedy as Greedy
from lq.allocation.lagrangian import Lagrangian as Lagrangian
from lq.allocation.pareto import pareto_front as pareto_front
from lq.allocation.problem import Problem as Problem
from lq.allocation.problem import Solution as Solution
from lq.allocation.solvers import SOLVERS as SOLVERS
from lq.allocation.solvers import Solver as Solver
from lq.allocation.solvers import solver as solver
