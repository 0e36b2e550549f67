"""Figures of the atlas: what is drawn is the ratio of incentives, with the line where y+ starts to fall."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_losses_tokens import MINUS, PLUS, shared_suffix

from sims import Optimizer, gradient_descent, learn_masks
from sims.plots.atlas import FAR, SPAN, log_ratio, plot_incentives, plot_masks
from theory.conditions import IncentiveRatio, incentive_ratio
from theory.losses import Pair, get
from theory.losses.sparse_po import SparsePO

DA, DB = np.linspace(-4, 1, 11), np.linspace(-6, 2, 9)
A0, B0 = -1.5, -4.0


def of(name):
    grid = np.broadcast_to(A0 + DA, (9, 11))[..., None], np.broadcast_to(B0 + DB[:, None], (9, 11))[..., None]
    found = incentive_ratio(get(name), Pair(*grid, A0, B0, 3, 5))
    return IncentiveRatio(found.d_w[..., 0], found.d_l[..., 0], found.r[..., 0], found.kind)


def test_panels_hold_ln_r_and_its_edges():
    maps = {name: of(name) for name in ("ukl", "sppo_hard", "dpo")}
    path = ([0.0, -1.0], [0.0, -2.0])
    axes = plot_incentives(maps, DA, DB, (2.0, 9.0), {"ukl": path})
    assert [ax.get_title("left") for ax in axes] == list(maps)
    # UKL: d_w = 1, d_l = e^db, so ln r = -db; edges at db = -ln 2 and -ln 9.
    mesh, *contours = axes[0].collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(9, 11), np.broadcast_to(-DB[:, None], (9, 11)))
    assert mesh.get_clim() == (-SPAN, SPAN)
    heights = [float(c.get_paths()[0].vertices[0, 1]) for c in contours]
    assert heights == pytest.approx([-math.log(2), -math.log(9)])
    np.testing.assert_array_equal(axes[0].lines[0].get_xydata(), np.transpose(path))
    # DPO: r = 1 everywhere, no edge, no path.
    np.testing.assert_allclose(np.asarray(axes[2].collections[0].get_array()), 0, atol=1e-12)
    assert len(axes[2].collections) == 1
    assert len(axes[2].lines) == 1
    assert len(axes[0].figure.axes) == 7, "six panels of a row and the colour bar"
    with pytest.raises(ValueError, match="shape"):
        plot_incentives({"ukl": of("ukl")}, DA, DB[1:])
    with pytest.raises(ValueError, match="one per loss"):
        plot_incentives(maps, DA, DB, axes=[Figure().subplots()])


def test_ratios_of_any_sign():
    d_w, d_l = np.array([1, 2, 0, -1, 1, 1, 0, -1, 1e300]), np.array([1, 1, 1, 1, 0, -1, 0, -1, 1e-300])
    seen = log_ratio(IncentiveRatio(d_w, d_l, d_w, "two-likelihood"))
    np.testing.assert_allclose(seen, [0, math.log(2), -FAR, -FAR, FAR, FAR, np.nan, np.nan, FAR])


def test_masks_and_the_curves_beside_them():
    model = shared_suffix(0.7, 0.3)
    loss, sgd = SparsePO(beta=0.5, lam_u=0.02, lam_d=0.02), Optimizer("sgd", 0.02)
    run = learn_masks(model, loss, sgd, 40, mask_lr=0.02, every=10)
    plain = gradient_descent(model, get("dpo", beta=0.5), sgd, 40, every=10)
    masks, curves = plot_masks(run, {"DPO": plain})
    image = np.asarray(masks.collections[0].get_array()).reshape(6, 5)
    np.testing.assert_array_equal(image, np.concatenate([run.masks(PLUS), run.masks(MINUS)], axis=1).T)
    assert np.ptp(image) > 0.5
    labels = [f"$y^{s}_{k + 1}$: {z}" for s, y in (("+", PLUS), ("-", MINUS)) for k, z in enumerate(y)]
    assert [t.get_text() for t in masks.get_yticklabels()] == labels
    drawn = {line.get_label(): line.get_xydata() for line in curves.lines}
    for label, t in (("learned masks", run.trajectory), ("DPO", plain)):
        a, u = t.log_probs(PLUS), t.margin()
        np.testing.assert_allclose(drawn[label], np.c_[u - u[0], a - a[0]], atol=1e-12)
        assert np.abs(drawn[label][-1]).min() > 1e-3
    with pytest.raises(ValueError, match="2 axes"):
        plot_masks(run, {}, [Figure().subplots()])
