"""Figures of the app: numpy arrays in, `plotly.graph_objects.Figure` out.

Knows the encodings (which colour means what, which scale is shown) and Plotly's traps. Does not know
Streamlit, models, captures, the reader's theme or which head is chosen: a figure that changed with the choice
would lose the selection that made it. L layers, H query heads, T tokens, all 0-based. Backgrounds are
transparent and ordinary text has no colour of its own, so light and dark are the page's business; the page
also draws headings and captions.
"""

from app.figures.heads import head_map, head_quadrant
from app.figures.layers import kept_by_layer, layer_alr
from app.figures.tokens import loss_curves, norm_and_attention, norm_attention_scatter, pooled_map

__all__ = [
    "head_map",
    "head_quadrant",
    "kept_by_layer",
    "layer_alr",
    "loss_curves",
    "norm_and_attention",
    "norm_attention_scatter",
    "pooled_map",
]
