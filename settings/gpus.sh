if [ -z "$LAUNCH" ]; then       # a copy of the model on each GPU; training deals one model's state to all of them
    here=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU) || true
    [ -n "$PRINT" ] || [ "$here" -gt 0 -a "${GPUS:-1}" -le "$here" ] ||
        refuse "nvidia-smi -L lists $here GPUs${GPUS:+, GPUS=$GPUS wants more}. Without one: LAUNCH=python"
    default GPUS="$here"
    [ "$GPUS" -le 1 ] || default LAUNCH="accelerate launch --config_file configs/ddp.yaml --num_processes $GPUS" \
        LAUNCH_TRAINING="accelerate launch --config_file configs/fsdp.yaml --num_processes $GPUS"
fi
