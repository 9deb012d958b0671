"""Figures of the app: numpy arrays in, `plotly.graph_objects.Figure` out.

Knows the encodings (which colour means what, which scale is shown) and Plotly's traps. Does not know
Streamlit, models, captures or which head is chosen: a figure that changed with the choice
would lose the selection that made it. L layers, H query heads, T tokens, all 0-based. Backgrounds are
transparent and ordinary text has no colour of its own, so light and dark are the page's business; the page
also draws headings and captions.
"""

from app.figures.comparing import gamma_spread, verdict_bars
from app.figures.evaluation import Curve, length_depth_maps, score_by_bytes, score_by_position
from app.figures.layers import layer_alr, layer_costs, means_by_layer
from app.figures.maps import head_map, ratio_map
from app.figures.paper import channel_shares, excess_loss, key_dimensions, zeroed_dimensions
from app.figures.planes import factor_plane, gamma_against, head_quadrant
from app.figures.plans import Line, front
from app.figures.texts import head_over_texts, order_agreement
from app.figures.tokens import gamma_by_query, loss_curves, norm_and_attention, norm_attention_scatter, pooled_map

__all__ = [
    "Curve",
    "Line",
    "channel_shares",
    "excess_loss",
    "factor_plane",
    "front",
    "gamma_against",
    "gamma_by_query",
    "gamma_spread",
    "head_map",
    "head_over_texts",
    "head_quadrant",
    "key_dimensions",
    "layer_alr",
    "layer_costs",
    "length_depth_maps",
    "loss_curves",
    "means_by_layer",
    "norm_and_attention",
    "norm_attention_scatter",
    "order_agreement",
    "pooled_map",
    "ratio_map",
    "score_by_bytes",
    "score_by_position",
    "verdict_bars",
    "zeroed_dimensions",
]
