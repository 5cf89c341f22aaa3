"""What each operation does to an adapted weight that reaches it: one line a rule.

A rule is `(program, equation, values) -> outputs`, or None where it has no exact answer: the weight is then made dense.
"""

from jpeft.rewrite import control, experts, moves, products

RULES = {
    "transpose": moves.transpose,
    "reshape": moves.reshape,
    "squeeze": moves.squeeze,
    "broadcast_in_dim": moves.broadcast_in_dim,
    "convert_element_type": moves.convert_element_type,
    "slice": moves.slice_,
    "dynamic_slice": moves.dynamic_slice,
    "copy": moves.unchanged,
    "copy_p": moves.unchanged,
    "name": moves.unchanged,
    "optimization_barrier": moves.barrier,
    "sharding_constraint": moves.unchanged,
    "reshard": moves.unchanged,
    "dot_general": products.dot_general,
    "ragged_dot_general": experts.ragged_dot,
    "gather": products.gather,
    "conv_general_dilated": products.conv_general_dilated,
    "jit": control.jit,
    "pjit": control.jit,
    "closed_call": control.closed_call,
    "core_call": control.closed_call,
    "remat2": control.remat,
    "checkpoint": control.remat,
    "shard_map": control.shard_map,
    "pvary": moves.pvary,
    "custom_vjp_call": control.opaque,
    "custom_jvp_call": control.opaque,
    "scan": control.scan,
    "while": control.while_,
    "cond": control.cond,
}
