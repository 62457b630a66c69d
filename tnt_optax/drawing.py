"""A plot of the numbers that `diagnostics` returns."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_diagnostics(values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> "Figure":
    """A plot of the spectra of all factors with the damping, and of the quadratic model over the steps.

    Each mode of each parameter has a row. Left: a line from the smallest eigenvalue to the largest, a dot for the mean,
    and a vertical line for the damping. Eigenvalues below 1e-6 of the largest of all are at the left edge. Right: the
    share of the eigenvalues that are smaller than the damping. A stack of factors has one row, with its smallest and
    its largest eigenvalue, all its means, and its mean share.

    If there is a quadratic model, the plot also has its learning rate and momentum, the predicted and the measured
    reduction of the loss, and the damping of the model, over the steps.

    Args:
      values: the result of :func:`diagnostics`, or a sequence of the results of several steps. The spectra are those of
        the last one.

    Returns:
      A matplotlib figure without a window. Save it with ``figure.savefig("spectra.png")``.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: ``values`` contains no factor and no quadratic model.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> tx, params = tnt_optax.tnt(0.03, fisher="empirical"), {"kernel": jnp.ones((4, 3))}
      >>> updates, opt_state = tx.update(params, tx.init(params), params)
      >>> figure = tnt_optax.draw_diagnostics(tnt_optax.diagnostics(opt_state))
      >>> len(figure.axes)  # Spectra, and shares below the damping.
      2
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("draw_diagnostics needs matplotlib: pip install matplotlib.") from None
    history = [values] if isinstance(values, Mapping) else list(values)
    last = history[-1] if history else {}
    rows = [match.group(1) for match in map(re.compile(r"(.*mode_\d+)/mean_eigenvalue").fullmatch, last) if match]
    models = [name.removesuffix("steps") for name in last if name.endswith("quadratic_model/steps")]
    if not rows and not models:
        raise ValueError("values: expected what diagnostics returned, found no '.../mode_0/mean_eigenvalue' in it.")
    heights = [1.2 + 0.2 * len(rows)] * bool(rows) + [2.5] * len(models)
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if rows:
        _draw_spectra(parts.pop(0), last, rows)
    for part, prefix in zip(parts, models, strict=True):
        _draw_model(part, history, prefix)
    return figure


def _draw_model(figure: Any, history: Sequence[Mapping[str, Any]], prefix: str) -> None:
    def curve(name: str) -> np.ndarray:
        return np.array([np.ravel(values[prefix + name]) for values in history])

    panels = (("learning_rate",), ("momentum",), ("predicted_reduction", "true_reduction"), ("damping",))
    for axis, names in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for color, name in zip(("tab:blue", "tab:red"), names, strict=False):
            axis.plot(curve("steps"), curve(name), ".-", color=color, label=name.replace("_", " "))
        axis.set(xlabel="steps")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        if names[0] in ("predicted_reduction", "damping"):
            sizes = np.abs(np.concatenate([np.ravel(curve(name)) for name in names]))
            # Logarithmic, but with a place for a loss that grew.
            axis.set_yscale("symlog", linthresh=np.min(sizes[sizes > 0], initial=1))
    figure.suptitle(f"{prefix.rstrip('/')}: {int(curve('rejected_steps')[-1].sum())} rejected steps", fontsize=9)


def _draw_spectra(figure: Any, values: Mapping[str, Any], rows: list[str]) -> None:
    def column(what: str) -> list[np.ndarray]:
        return [np.ravel(values[f"{row}/{what}"]) for row in rows]

    means, smallest, largest = (column(f"{which}_eigenvalue") for which in ("mean", "smallest", "largest"))
    dampings = {float(x) for name, value in values.items() if name.endswith("tnt/damping") for x in np.ravel(value)}
    top = max([*dampings, *(float(np.max(x, initial=0)) for x in largest)])
    left_edge = min([1e-6 * top, *(0.1 * damping for damping in dampings)])

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
