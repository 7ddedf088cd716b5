"""Widths within budgets: what they cost, and the best choice by interchangeable solvers."""
