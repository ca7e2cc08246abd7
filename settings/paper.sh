# The published run: what is not said here is a stage's default, the paper's value.
default VARIANTS="main base_answers no_reg gold"
LEARN="--rounding stochastic"   # to nearest, as published, bfloat16 loses most steps: docs/precision.md
TALK="--system fold"            # Mixtral's chat template knows no system role
. settings/gpus.sh
