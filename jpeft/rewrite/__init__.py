"""The fast path's machinery: a traced program evaluated with adapted weights in place of weights.

`weight` is what travels, `program` walks the equations, and the rules say what an equation does to an adapted weight:
`moves` (transpose, reshape, slice), `products` (dot, lookup, convolution), `experts` (ragged dot), `control` (scan,
cond, while, remat, jit).
"""
