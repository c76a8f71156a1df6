"""Every threshold of the weight forensics; `studies/audit/known_answers.py` sets and tests them."""

VERSION = "1"

# Lineage
RELATED = 0.5
"""Cosine of matching tensors below which they do not come from this base (median)."""

# Exact hypotheses
FAITHFUL = 0.999
"""Share of equal values of a tensor that was quantised from the base and not touched."""
UNFAITHFUL = 0.9
"""Share of equal values below which it is not the quantised base."""
ON_GRID = 0.999
"""Share of values that stay when a tensor is quantised again to the grid that it lies on."""
ROW_LIMIT = 0.1
"""Largest share of unequal values that one row of a faithful tensor may have."""
ROUNDING = 2.0
"""Energy left beyond a hypothesis, in units of the dtype's expected rounding error."""
EXPLAINED = 1e-4
"""Share of the change's energy that an exact scaling may leave."""

# Pruning
NEW_ZEROS = 0.01
"""Least share of weights that became zero."""
NEW_ZEROS_ON_GRID = 0.05
"""The same on a grid that holds zero, beside the zeros that rounding the base makes."""

# Low rank
EDGE_MARGIN = 1.1
"""Singular values count above the noise edge times this."""
RANK_SHARE = 0.6
"""Largest rank of a low-rank change, as a share of the shorter side."""
LOW_RANK_TAIL = 1.3
"""Energy beyond the rank, in units of the rounding error, that still is rounding."""
LOW_RANK_ENERGY = 0.95
"""Share of the energy in the rank below which a change is not called low-rank."""

# Noise
WHITE_EDGE = (0.8, 1.15)
"""Largest singular value over the white noise edge, after rows and columns were levelled."""
WHITE_COUNT = 0.5
"""Share of the changed matrices that must be white."""

# Further training
DENSE_COUNT = 0.2
"""Share of the changed matrices that must be dense; a few strays are in the map of differences."""

# Direction ablation
SUPPORT = 4
"""Least number of writing tensors that share the direction."""
SELF_PROJECTION = 0.6
"""Least self-projection of a supporting tensor."""
CERTAIN = 0.9
"""Median self-projection of the support from which the finding is of high severity."""
SIGNIFICANT = 6.0
"""Least self-projection in units of its spread under noise, 1/sqrt(columns)."""
FOCUS = 3.0
"""Least share of the change that lies on the axis, in units of an even spread, 1/rows."""
SAME_SIGN = 0.9
"""Share of supporting tensors whose strength has the same sign."""
FREE_LEVERAGE = 0.5
"""|W'a| over the tensor's largest singular value up to which ``SELF_PROJECTION`` is enough."""
LEVERAGE_SLOPE = 1.25
"""Self-projection asked for beyond that, per unit of leverage: whatever shrinks a matrix, or takes
back an update that dominates it, looks like a projection along its leading direction."""
OWN_ALONE = 0.8
"""Share of the change from which a tensor that lost its own direction supports no other one."""
OWN_LEVERAGE = 0.8
"""Largest leverage of a direction of a tensor's own."""
OWN_SELF_PROJECTION = 0.95
"""Least self-projection of a tensor with a direction of its own."""
OWN_ENERGY = 0.5
"""Least share of the change in its leading singular pair, for a direction of its own."""
ROUGHNESS = 0.15
"""Largest unevenness of the strength over layers, for directions of their own."""

# Merges
MERGE_RESIDUAL = 0.02
"""Share of the change's energy that a linear combination of parents may leave."""
MERGE_SPREAD = 0.05
"""Largest spread of the weights over tensors of a plain linear merge."""

# Without a base
GAP = 0.1
"""Ratio of neighbouring eigenvalues below which a direction is missing in the writers."""
