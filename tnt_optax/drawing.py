"""A plot of the numbers that `diagnostics` returns."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_diagnostics(values: Mapping[str, Any]) -> "Figure":
    """The spectra of all factors and the damping: one row for each mode of each parameter.

    Left: a line from the smallest eigenvalue to the largest, a dot for the mean, a vertical line for the damping.
    Eigenvalues below 1e-6 of the largest of all are drawn at the left edge. Right: the share of the eigenvalues that
    are smaller than the damping. A stack of factors has one row, with its extremes, all its means and its mean share.

    Args:
      values: what `diagnostics` returned.

    Returns:
      A figure without a window: `draw_diagnostics(values).savefig("spectra.png")`.

    Raises:
      ImportError: there is no matplotlib.
      ValueError: no factor in `values`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("draw_diagnostics needs matplotlib: pip install matplotlib.") from None
    rows = [match.group(1) for match in map(re.compile(r"(.*mode_\d+)/mean_eigenvalue").fullmatch, values) if match]
    if not rows:
        raise ValueError("values: expected what diagnostics returned, found no '.../mode_0/mean_eigenvalue' in it.")

    def column(what: str) -> list[np.ndarray]:
        return [np.ravel(values[f"{row}/{what}"]) for row in rows]

    means, smallest, largest = (column(f"{which}_eigenvalue") for which in ("mean", "smallest", "largest"))
    dampings = {float(x) for name, value in values.items() if name.endswith("tnt/damping") for x in np.ravel(value)}
    top = max([*dampings, *(float(np.max(x, initial=0)) for x in largest)])
    left_edge = min([1e-6 * top, *(0.1 * damping for damping in dampings)])

    figure = Figure(figsize=(10, 1.2 + 0.2 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = np.arange(len(rows))
    ends = [max(np.min(x), left_edge) for x in smallest], [max(np.max(x), left_edge) for x in largest]
    left.hlines(places, *ends, color="tab:blue", alpha=0.4, linewidth=3, label="eigenvalues")
    dots = np.repeat(places, [len(x) for x in means])
    left.plot(np.maximum(np.concatenate(means), left_edge), dots, "o", color="tab:blue", markersize=4, label="mean")
    for number, damping in enumerate(sorted(dampings)):
        left.axvline(damping, color="tab:red", linewidth=1, label=None if number else "damping")
    left.set(xscale="log", xlim=(left_edge, 2 * top), xlabel="eigenvalues of the factors")
    left.set_yticks(places, rows, fontsize=7)
    left.set_ylim(len(rows) - 0.5, -0.5)  # The first on top.
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    shares = [float(np.mean(x)) for x in column("share_below_damping")]
    right.barh(places, shares, height=0.6, color="tab:red", alpha=0.6)
    right.set(xlim=(0, 1), xlabel="share below the damping")
    right.tick_params(axis="y", labelleft=False)
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
    return figure
