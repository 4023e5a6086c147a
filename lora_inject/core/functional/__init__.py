"""The arithmetic: `W' = W + scale * B @ A`, stated once for each use, in a file of its own.

| file | does |
|---|---|
| `linear` | adds the update to a layer's output, without the delta (arXiv:2106.09685, eq. 3) |
| `gain` | multiplies outputs by what the norms of `W + delta` give |
| `weight` | forms `W'` where a model reads the weight instead of calling the layer |
| `lazy` | puts this off until an operation needs it |
| `fold` | adds the delta to rows of W for merging |
"""
