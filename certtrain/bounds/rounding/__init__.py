"""Bounds of what a network computes in floating point, whatever the order of its sums.

The rules of `interval.py` bound the network as real mathematics. These bound the *deployed* network: every value that
an `Arithmetic` can produce, for any order and parenthesisation of every sum, with fused multiply-adds or without, for
every input in the box. Everything here is computed in float64, whose own errors are bounded and added in the same way,
so that a positive margin is a theorem about the numbers that will be compared. docs/soundness.md has the derivation;
the numbers of equations in these files are its.

The one idea: the computed sum of n products lies within e·Σ|w_i||x_i| of the exact one, where e grows like n roundings
(Higham, Accuracy and Stability of Numerical Algorithms, ch. 3). With |x_i| ≤ m_i over the box, that is a radius of
|w|·(r + e·m) instead of |w|·r: the same two products as without rounding. (`propagation.py`) Linear bounds subtract
what the roundings of each operation can cost. (`backward.py`)
"""
