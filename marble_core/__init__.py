"""Multi-reward balancing for diffusion RL: one advantage and one gradient per reward, one direction that improves all.

Pure functions on tensors and pytrees, torch only. By topic: ``advantages``, ``nft``, ``gradients``, ``gram``,
``noise``, ``simplex``, ``harmonize``, ``ema``, ``diagnostics``.
"""

from marble_core.diagnostics import (
    Alignment,
    AlignmentStats,
    AlignmentSummary,
    alignment,
    cross_alignment,
    init_alignment_stats,
    merge_alignment_stats,
    null_alignment,
    summarize_alignment_stats,
    update_alignment_stats,
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
from marble_core.gram import cross_gram, gram_matrix, normalize_gram, psd_part
from marble_core.harmonize import Harmonization, harmonize
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
from marble_core.simplex import min_norm_gap, min_norm_weights, project_simplex

__version__ = "0.1.0"
__all__ = [
    "SLOW_DECAY",
    "STANDARD_DECAY",
    "Alignment",
    "AlignmentStats",
    "AlignmentSummary",
    "Coefficients",
    "DecaySchedule",
    "GramEma",
    "Guard",
    "Harmonization",
    "Moments",
    "SignalShare",
    "alignment",
    "cross_alignment",
    "cross_gram",
    "ema_tree",
    "eval_ema_decay",
    "gradient_snr",
    "gram_matrix",
    "harmonize",
    "init_alignment_stats",
    "init_coefficients",
    "init_gram_ema",
    "init_moments",
    "merge_alignment_stats",
    "min_norm_gap",
    "min_norm_weights",
    "normalize_gram",
    "null_alignment",
    "old_policy_decay",
    "project_simplex",
    "psd_part",
    "refresh_due",
    "signal_share",
    "summarize_alignment_stats",
    "update_alignment_stats",
    "update_coefficients",
    "update_gram_ema",
    "update_moments",
]
