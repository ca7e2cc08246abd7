# Every step once, in the embedded world: one iteration, three minutes.
default VARIANTS="main no_reg" ITERATIONS=1 SAMPLES=8 TEST_SAMPLES=8 TASKS_PER_SPLIT=8 TRAIN_PAIRS=64 EPOCHS=8
. settings/toy.sh
