"""Allocation: one option per item within budgets, by interchangeable solvers; plain numbers in, no model in sight."""

from lq.allocation.solvers.exact import Exact as Exact
from lq.allocation.solvers.greedy import Greedy as Greedy
from lq.allocation.solvers.lagrangian import Lagrangian as Lagrangian
from lq.allocation.solvers.names import SOLVERS as SOLVERS
from lq.allocation.solvers.names import Solver as Solver
from lq.allocation.solvers.names import solver as solver
from lq.allocation.solvers.pareto import pareto_front as pareto_front
from lq.allocation.solvers.problem import Problem as Problem
from lq.allocation.solvers.problem import Solution as Solution
