"""What the operations of networks are called, and what bounds may assume of each: one record per operation.

A network spells one operation in many ways: `nn.ReLU`, `F.relu(input=x)`, `x.relu_()`. A record holds the one function
its rules are written for, every spelling with the arguments it takes, brought into one order, and the traits from which
the rest of `bounds` follows: in which operands a call is affine, whether it only moves elements, whether it grows.
Interval, linear and floating-point rules are registered in the files that hold them, under the record's function.

Every record also states its preconditions (`require`): what the rules do not cover is refused by name before a rule
sees it. To add an operation from outside, see `register_operation`.

`record` says what a record is and holds the tables. The other files enter the records, a family each.
"""

from certtrain.bounds.operations import (  # noqa: F401  whose records stand in OPERATIONS
    activations,
    arithmetic,
    inspections,
    joining,
    movement,
    pooling,
    products,
    scalings,
    softmax,
)
