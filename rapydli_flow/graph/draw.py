"""Pictures of graphs: SVG without any outside program, and the table and picture that notebooks show.

A network flows down. Each op is a box, each layer a frame, laid out as a graph of its own whose values
enter and leave through ports on its edges; so a line crosses neither boxes nor frames:

    layers      longest path from the inputs; a line that spans several layers gets a vertex in each
    order       sweeps of barycentres, the order with the fewest crossings (Sugiyama 1981)
    x           vertices in chains share one x (after Brandes and Köpf 2001); chains are centred
    columns     a tall network is cut where one value crosses, and set like a newspaper

A training step is a grid: down the network, up its gradients, and at the right what is updated; a layer,
its gradient and its updates share a row. Parameters, state, clocks and constants are not drawn. Of graphs
of more than `COMPACT` ops each layer is one box. Sizes are in pixels, colours fit light and dark pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
