"""Every tolerance that is looser than "the same bits", with its reason."""

from __future__ import annotations

# Standard errors an average may be off. A fresh draw passes 99.994 % of the time; all draws here
# come from fixed seeds, so that a test that passes once always passes.
SIGMAS = 4.0

# Rounding errors of the codec's own fp32 arithmetic, in code steps.
# First moment: a sum, its reciprocal and a product, 2^-24 each, of values up to 127; the rest is
# exact: 127 * 3 * 2^-24 < 2^-15.
EXP_AVG_CODE_STEPS = 2.0**-15
# Second moment, encoded: a root, a reciprocal and a product of values up to 255, and half a unit of
# the 15 fraction bits: 255 * 3 * 2^-24 + 2^-16 < 2^-14. Decoded: a constant and two products, and
# half of the square's error, 255 * 3.5 * 2^-24 < 2^-14. Fourth roots halve all but their own.
EXP_AVG_SQ_CODE_STEPS = 2.0**-13
# A decoded first moment: a reciprocal and two products, 2^-24 relative each, and their products.
EXP_AVG_DECODE_RELATIVE = 4 * 2.0**-24

# lr * update in fp32 against fp64: 16 roundings of 2^-24, counted in tests/optim/
# test_update_rule.py; 17 for their products.
ADAMW_UPDATE_RELATIVE = 17 * 2.0**-24

# Relative L2 error of the update, last 20 of 200 steps at beta2 0.95, against fp64 AdamW. The
# simulation over 400 steps that chose the "sqrt" format had 0.10 nearest and 0.13 stochastic, 0.11
# and 0.14 with gradients shrinking 30 times; here they shrink twice as fast and give 0.12 and 0.15.
# Formats that stall or lose small scales had 0.4 and more. "fourth_root" gives at most 0.088
# and 0.100 here.
DRIFT_RELATIVE_L2 = {
    "sqrt": {"nearest": 0.15, "stochastic": 0.18},
    "fourth_root": {"nearest": 0.10, "stochastic": 0.12},
}
# Mean of sqrt(v) over its exact value, minus 1, in the same runs: 0.00 to 0.01 there.
DRIFT_BIAS = 0.03

# Where sqrt(v) settles without gradients, at beta2 0.9 and nearest scales: x times the root where
# decay and what a step adds cancel. A step moves it by (1/x^2 - 1) / 20, which stalls below half a
# bf16 ulp, 2^-8 at most: for x above 0.963.
SETTLED_ROOT_RELATIVE = 0.04

# Updates of the other rules in fp32 against fp64: fewer roundings than AdamW's 16, but for the L2
# term in flash_adam's gradient, which is rounded once more before it meets moments and root.
RULE_UPDATE_RELATIVE = 20 * 2.0**-24
# The first step from zero state, of weights of 0.01 and more: steps are at most as large as the
# weights, and 32-bit masters keep all but rounding.
FIRST_STEP_RELATIVE = 2.0**-18
# Loss of 8-bit state against fp32 state after 400 steps, mean of the last 50, relative: at most
# 1e-4 seen.
TRAINED_LOSS = 0.001
# How far the weights are from the exact run's after the same steps, as the norm of the difference
# over theirs: 0.0054, 0.0175 (signs that turn move a weight by the whole learning rate) and 0.0024
# at most seen.
TRAINED_WEIGHTS = {"flash_adam": 0.01, "flash_lion": 0.03, "flash_sgd": 0.005}
# Share of signs that Lion with 8-bit momentum has in common with exact Lion: 0.987 seen.
LION_AGREEMENT = 0.98
