"""Multi-reward balancing for diffusion RL: one advantage and one gradient per reward, one direction that improves all.

Pure functions on tensors and pytrees, torch only. By topic: ``advantages``, ``nft``, ``gradients``, ``gram``,
``noise``, ``noise_aware``, ``simplex``, ``cone``, ``upgrad``, ``prior``, ``harmonize``, ``ema``, ``diagnostics``.
"""

from marble_core.advantages import (
    GroupStats,
    advantages_from_stats,
    group_advantages,
    init_group_stats,
    merge_group_stats,
    update_group_stats,
)
from marble_core.cone import cone_weights
from marble_core.diagnostics import (
    Alignment,
    alignment,
    cross_alignment,
    null_alignment,
)
from marble_core.ema import (
    SLOW_DECAY,
    STANDARD_DECAY,
    Coefficients,
    DecaySchedule,
    Guard,
    ema_tree,
    eval_ema_decay,
    init_coefficients,
    old_policy_decay,
    refresh_due,
    update_coefficients,
)
from marble_core.gains import GainState, gains_since_start, init_gains, update_gains
from marble_core.gradients import combine_rows, flatten_rows, gradient_rows, unflatten_like
from marble_core.gram import cross_gram, gram_matrix, normalize_gram, psd_part
from marble_core.harmonize import Harmonization, harmonize, rescale
from marble_core.nft import (
    AffineTerms,
    affine_residual,
    affine_terms,
    branch_losses,
    clamped_fraction,
    combine_advantages,
    combine_interpolation,
    interpolation,
    nft_loss,
)
from marble_core.noise import (
    GramEma,
    Moments,
    SignalShare,
    gradient_snr,
    init_gram_ema,
    init_moments,
    signal_share,
    update_gram_ema,
    update_moments,
)
from marble_core.noise_aware import NoiseAware, SignalGram, noise_aware_weights, shrink_gram, signal_gram
from marble_core.prior import lag_weights, restore_spread, shrink_to_prior, soft_min_weights
from marble_core.shared_cotangent import SharedRows, shared_cotangent_rows
from marble_core.simplex import min_norm_gap, min_norm_weights, project_simplex
from marble_core.upgrad import upgrad_weights

__version__ = "0.1.0"
__all__ = [
    "SLOW_DECAY",
    "STANDARD_DECAY",
    "AffineTerms",
    "Alignment",
    "Coefficients",
    "DecaySchedule",
    "GainState",
    "GramEma",
    "GroupStats",
    "Guard",
    "Harmonization",
    "Moments",
    "NoiseAware",
    "SharedRows",
    "SignalGram",
    "SignalShare",
    "advantages_from_stats",
    "affine_residual",
    "affine_terms",
    "alignment",
    "branch_losses",
    "clamped_fraction",
    "combine_advantages",
    "combine_interpolation",
    "combine_rows",
    "cone_weights",
    "cross_alignment",
    "cross_gram",
    "ema_tree",
    "eval_ema_decay",
    "flatten_rows",
    "gains_since_start",
    "gradient_rows",
    "gradient_snr",
    "gram_matrix",
    "group_advantages",
    "harmonize",
    "init_coefficients",
    "init_gains",
    "init_gram_ema",
    "init_group_stats",
    "init_moments",
    "interpolation",
    "lag_weights",
    "merge_group_stats",
    "min_norm_gap",
    "min_norm_weights",
    "nft_loss",
    "noise_aware_weights",
    "normalize_gram",
    "null_alignment",
    "old_policy_decay",
    "project_simplex",
    "psd_part",
    "refresh_due",
    "rescale",
    "restore_spread",
    "shared_cotangent_rows",
    "shrink_gram",
    "shrink_to_prior",
    "signal_gram",
    "signal_share",
    "soft_min_weights",
    "unflatten_like",
    "update_coefficients",
    "update_gains",
    "update_gram_ema",
    "update_group_stats",
    "update_moments",
    "upgrad_weights",
]
